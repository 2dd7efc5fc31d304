"""A network compiled for one device by AOTInductor, kept on this machine's disk.

    CACHE/KEY/          a package and the digests of its files; whole if it is there
    CACHE/KEY.new-X/    one that is being made, and all that its compiler writes
    CACHE/KEY.lock      held by who makes or loads it

KEY is made of all that decides a package: the exported network, its weights, the shape
and dtype of its input, the device, the processor, torch. Who makes or loads one holds
its lock alone (flock), so of several workers of a machine one compiles and the others
wait. The system frees the lock of a process that is killed, and what that left
unfinished is removed by the next. What another process has loaded stays mapped when its
files are removed.

Why AOTInductor, and why a folder: docs/decisions/0019-compiled-networks.md.

One file, because a package's folder, its lock and what is loaded of it are one thing.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medray.errors import CompileError, MedrayError
from medray.models.compiler import OPTIONS, in_a_line, write_package

log = logging.getLogger(__name__)

FOLDER_VARIABLE = "MEDRAY_COMPILE_CACHE"
"""Folder of the packages, on a disk of this machine."""

_LOOK_S, _WAIT_S = 0.2, 1800.0
_DIGESTS = "digests.json"
# Of a batch's outputs, relative (L2). Rounding in bfloat16 makes about 0.01 of it.
_MOST_ERROR = 0.1
_ADVICE = f"set {FOLDER_VARIABLE} to a folder on another disk, or give --compile off"

type _Run = Callable[[torch.Tensor], torch.Tensor]


def cache_folder() -> Path:
    """Return the folder of the packages, by default ~/.cache/medray/compiled.

    MEDRAY_COMPILE_CACHE names another one; XDG_CACHE_HOME takes the place of ~/.cache.
    """
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches) / "medray" / "compiled"


class Compiled:
    """A compiled network, to be called with batches of the shape it is made for."""

    def __init__(
        self,
        network: nn.Module,
        shape: tuple[int, int, int, int],
        device: torch.device,
        dtype: torch.dtype,
        *,
        name: str,
        threads: int = 1,
    ) -> None:
        """Load the package of a network, which is made if it is not there.

        Args:
            network: In evaluation mode; maps (N, 3, H, W) to logits or features. It is
                left as it is.
            shape: Of its input.
            device: Where it is to run.
            dtype: Of weights, input and output.
            name: What it is called in errors.
            threads: That may call it at once.

        Raises:
            CompileError: It cannot be exported or compiled, or there is no compiler, or
                the folder of packages cannot be written, or the package gives other
                numbers than the network.
        """
        self._shape, self._dtype = shape, dtype
        # A copy: its caller may have it in another dtype.
        network = copy.deepcopy(network).to(device, dtype).requires_grad_(False)
        program = _export(
            network, self._inputs(torch.zeros(shape, device=device)), name
        )
        self.bytes = sum(t.nbytes for t in program.state_dict.values())
        """Of its weights on the device."""
        entry = cache_folder() / _key(program, shape, device, dtype)
        with _locked(entry):
            self._run, made = self._load(entry, program, device, name, threads)
            if made:
                self._check(network, entry, name)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map a batch, of any float dtype, to the network's output.

        One with fewer images than the shape has is filled up with zeros for the while.
        """
        count, most = len(inputs), self._shape[0]
        if count > most or inputs.shape[1:] != self._shape[1:]:
            raise ValueError(f"compiled for {self._shape}, found {tuple(inputs.shape)}")
        if count < most:
            rest = inputs.new_zeros((most - count, *inputs.shape[1:]))
            inputs = torch.cat([inputs, rest])
        return self._run(self._inputs(inputs))[:count]

    def _inputs(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.to(self._dtype, memory_format=torch.channels_last)

    def _load(
        self, entry: Path, program: Any, device: torch.device, name: str, threads: int
    ) -> tuple[_Run, bool]:
        """Return the package of an entry that is locked, and whether it was made now.

        A broken one is made again.
        """
        if entry.is_dir():
            try:
                return self._tried(entry, device, threads), False
            except Exception as error:  # of another machine's libraries, say
                log.warning(
                    "%s: cannot be loaded, made again (%s)", entry, in_a_line(error)
                )
        _make(entry, program, device, name)
        try:
            return self._tried(entry, device, threads), True
        except Exception as error:
            raise CompileError(
                f"compile: {name} was compiled to {entry}, which cannot be loaded: "
                f"{in_a_line(error)}; give --compile off"
            ) from error

    def _check(self, network: nn.Module, entry: Path, name: str) -> None:
        """Compare what was made with the network itself, on noise."""
        noise = torch.Generator().manual_seed(0)
        inputs = torch.randn(self._shape, generator=noise)
        inputs = self._inputs(inputs.to(next(network.parameters()).device))
        with torch.inference_mode():
            wanted, found = network(inputs).float(), self._run(inputs).float()
        error = float((found - wanted).norm() / wanted.norm().clamp_min(1e-6))
        if not error < _MOST_ERROR:
            shutil.rmtree(entry)
            raise CompileError(
                f"compile: {name} was compiled, and gives other numbers than the "
                f"network itself (relative error {error:.2g} on noise, at most "
                f"{_MOST_ERROR}); give --compile off"
            )

    def _tried(self, entry: Path, device: torch.device, threads: int) -> _Run:
        """Load a package and run it once, so that all of its files are in memory."""
        kept = json.loads((entry / _DIGESTS).read_text())
        if kept != _digests(entry):
            raise ValueError("its files are not those that were written")
        run: _Run = torch._inductor.aoti_load_package(
            str(entry),
            device_index=device.index if device.index is not None else -1,
            num_runners=threads,
        )
        with torch.inference_mode():
            run(self._inputs(torch.zeros(self._shape, device=device)))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return run


def _export(network: nn.Module, example: torch.Tensor, name: str) -> Any:
    try:
        with torch.no_grad():
            return torch.export.export(network, (example,))
    except Exception as error:  # whatever the network's author wrote
        raise CompileError(
            f"compile: torch.export cannot follow {name} in {example.dtype}: "
            f"{in_a_line(error)}; give --compile off"
        ) from error


# --- names ----------------------------------------------------------------------------


def _key(
    program: Any, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> str:
    """Return the name of a package: another one wherever the bits may differ.

    The network is taken as it was exported, so that another version of the library
    that it comes from makes another package.
    """
    able = torch.cpu.get_capabilities()
    facts = {
        "code": program.graph_module.code,
        "shape": shape,
        "dtype": str(dtype),
        "device": _describe(device),
        "processor": sorted(name for name, has in able.items() if has is True),
        "machine": (platform.machine(), platform.libc_ver(), sys.version_info[:2]),
        "torch": (torch.__version__, str(torch.version.git_version)),
        "options": OPTIONS,
    }
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=16)
    for of in (program.state_dict, program.constants):
        for name, value in sorted(of.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            plain = value.detach().cpu().contiguous().flatten()
            digest.update(memoryview(plain.view(torch.uint8).numpy()))
    return digest.hexdigest()


def _describe(device: torch.device) -> tuple[str, ...]:
    if device.type != "cuda":
        return (device.type,)
    found = torch.cuda.get_device_properties(device)
    return (found.name, f"{found.major}.{found.minor}", f"{torch.version.cuda}")


def _digests(entry: Path) -> dict[str, str]:
    return {
        f"{path.relative_to(entry)}": hashlib.blake2b(
            path.read_bytes(), digest_size=16
        ).hexdigest()
        for path in sorted(entry.rglob("*"))
        if path.is_file() and path.name != _DIGESTS
    }


# --- the folder -----------------------------------------------------------------------


@contextlib.contextmanager
def _locked(entry: Path) -> Iterator[None]:
    """Have an entry to oneself.

    Raises:
        CompileError: The folder cannot be written.
        MedrayError: Whoever has it does not end.
    """
    with _written(entry.parent):
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(entry.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline, told = time.monotonic() + _WAIT_S, False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise MedrayError(
                        f"{entry}.lock: another process has compiled for "
                        f"{_WAIT_S / 60:.0f} minutes; end it, or give --compile off"
                    ) from None
            if not told:
                log.info("compile: waiting for another process's %s", entry)
            told = True
            time.sleep(_LOOK_S)
        yield
    finally:
        os.close(handle)  # the file stays: another may wait for it


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CompileError(
            f"{folder}: compiled networks are kept here, and it cannot be written "
            f"({in_a_line(error)}); free space or give this user permission, {_ADVICE}"
        ) from error


def _make(entry: Path, program: Any, device: torch.device, name: str) -> None:
    """Compile a network; the entry is there, whole, when this returns."""
    start = time.monotonic()
    with _written(entry.parent):
        if entry.exists():  # broken
            shutil.rmtree(entry)
        # Of a process that was killed; its compiler may be at work for a while yet.
        for left in entry.parent.glob(f"{entry.name}.new-*"):
            shutil.rmtree(left, ignore_errors=True)
        new = Path(tempfile.mkdtemp(prefix=f"{entry.name}.new-", dir=entry.parent))
    try:
        with _written(entry.parent):
            package = write_package(program, new, device, name)
            (package / _DIGESTS).write_text(json.dumps(_digests(package)))
            for path in package.rglob("*"):
                _flush(path)
            os.replace(package, entry)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    took = time.monotonic() - start
    log.info("compile: %s for %s in %.0f s, kept in %s", name, device, took, entry)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
