"""A network compiled for one device by AOTInductor, kept on this machine's disk.

    CACHE/KEY/          a package and the digests of its files; whole if it is there
    CACHE/KEY.new/      one that is being made, and all that its compiler writes
    CACHE/KEY.lock      held by who makes or loads it

KEY is made of all that decides a package: the exported network, its weights, the shape
and dtype of its input, the device, the processor, torch. Who makes or loads one holds
its lock alone (flock), so of several workers of a machine one compiles and the others
wait. The system frees the lock of a process that is killed, and what that left
unfinished is removed by the next. What another process has loaded stays mapped when its
files are removed.

Why AOTInductor, and why a folder: docs/decisions/0019-compiled-networks.md.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medray.errors import ConfigError, MedrayError, StoreError

log = logging.getLogger(__name__)

FOLDER_VARIABLE = "MEDRAY_COMPILE_CACHE"
"""Folder of the packages, on a disk of this machine."""

# A package that is made again gives the same bits: no choice is made by timing, and
# kernels for processors are of one thread (the predictor's threads share nothing).
_OPTIONS = {"deterministic": True, "max_autotune": False, "cpp.threads": 1}
_LOOK_S, _WAIT_S = 0.2, 1800.0
_DIGESTS = "digests.json"
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
    """A compiled network, to be called with batches of the one shape it is made for."""

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
            ConfigError: It cannot be exported or compiled, or there is no compiler.
            StoreError: The folder of packages cannot be written.
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
            self._run = self._load(entry, program, device, name, threads)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map a batch of the shape, of any float dtype, to the network's output."""
        if inputs.shape != self._shape:
            raise ValueError(f"compiled for {self._shape}, found {tuple(inputs.shape)}")
        return self._run(self._inputs(inputs))

    def _inputs(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.to(self._dtype, memory_format=torch.channels_last)

    def _load(
        self, entry: Path, program: Any, device: torch.device, name: str, threads: int
    ) -> _Run:
        """Return the package of an entry that is locked; a broken one is made again."""
        if entry.is_dir():
            try:
                return self._tried(entry, device, threads)
            except Exception as error:  # of another machine's libraries, say
                log.warning("%s: cannot be loaded, made again (%s)", entry, _one(error))
        _make(entry, program, device, name)
        try:
            return self._tried(entry, device, threads)
        except Exception as error:
            raise ConfigError(
                f"compile: {name} was compiled to {entry}, which cannot be loaded: "
                f"{_one(error)}; give --compile off"
            ) from error

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
        raise ConfigError(
            f"compile: torch.export cannot follow {name} in {example.dtype}: "
            f"{_one(error)}; give --compile off"
        ) from error


def _one(error: BaseException) -> str:
    """Return what an error says, on one line, without a compiler's command."""
    said = str(error).split("\nOutput:\n")[-1]
    return " ".join(f"{type(error).__name__}: {said}".split())[:300]


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
        "options": _OPTIONS,
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
        StoreError: The folder cannot be written.
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
        raise _not_written(folder, error) from error


def _not_written(folder: Path, error: BaseException) -> StoreError:
    return StoreError(
        f"{folder}: compiled networks are kept here, and it cannot be written "
        f"({_one(error)}); free space or give this user permission, {_ADVICE}"
    )


def _make(entry: Path, program: Any, device: torch.device, name: str) -> None:
    """Compile a network; the entry is there, whole, when this returns."""
    _check_compiler(name)
    new = entry.with_suffix(".new")
    start = time.monotonic()
    try:
        with _written(entry.parent):
            for left in (entry, new):  # broken, or of a process that was killed
                if left.exists():
                    shutil.rmtree(left)
            new.mkdir()
        _compile(program, new, device, name)
        with _written(entry.parent):
            package = new / "package"
            with zipfile.ZipFile(new / "network.pt2") as archive:
                archive.extractall(package)
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


def _compile(program: Any, new: Path, device: torch.device, name: str) -> None:
    from torch._inductor.utils import fresh_cache

    tempfile.gettempdir()  # is chosen once, and not to be what is set here
    search = _cuda_links(new) if device.type == "cuda" else {}
    with contextlib.ExitStack() as stack:
        # Compilers' files lie here too, for a process that is killed leaves them.
        stack.enter_context(_environment({"TMPDIR": str(new)} | search))
        stack.enter_context(_cuda_headers() if search else contextlib.nullcontext())
        # With nothing of an earlier compilation, and nothing left for a later one.
        stack.enter_context(fresh_cache(dir=str(new), delete=False))
        try:
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(new / "network.pt2"),
                inductor_configs={**_OPTIONS},  # which it adds to
            )
        except Exception as error:  # of torch, of Triton, of the compiler
            if _is_of_disk(error):
                raise _not_written(new.parent, error) from error
            raise ConfigError(
                f"compile: torch cannot compile {name} for {device}: {_one(error)}; "
                f"give --compile off"
            ) from error


def _is_of_disk(error: BaseException) -> bool:
    """Tell whether a compiler could not write; it says so in words alone."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    return any(os.strerror(code) in str(error) for code in codes)


def _check_compiler(name: str) -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"compile: {name} is to be compiled, and there is no C++ compiler "
            f"{compiler} on this machine ({platform.node()}); install one (Debian: "
            f"apt-get install g++), name one in CXX, or give --compile off"
        )


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# --- CUDA -----------------------------------------------------------------------------


@contextlib.contextmanager
def _cuda_headers() -> Iterator[None]:
    """Show the compiler the headers that come with torch.

    A machine without CUDA's toolkit has no others, and one with it may have those of
    another version.
    """
    from torch.utils import cpp_extension

    before, found = cpp_extension.CUDA_HOME, cuda_home()
    if found is not None:
        cpp_extension.CUDA_HOME = str(found)
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME = before


def cuda_home() -> Path | None:
    """Return the folder of CUDA's headers that PyTorch's packages bring."""
    found = importlib.util.find_spec("nvidia")
    for place in (found.submodule_search_locations or ()) if found else ():
        for header in sorted(Path(place).glob("cu*/include/cuda.h")):
            return header.parent.parent
    return None


def _cuda_links(new: Path) -> dict[str, str]:
    """Show the linker the driver's library: where it finds it, for the environment.

    A driver often comes without the name (libcuda.so) that a linker looks for; torch
    has loaded it.
    """
    links = new / "driver"
    links.mkdir()
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if os.path.basename(path).startswith("libcuda.so"):
            (links / "libcuda.so").symlink_to(path)
            break
    others = os.environ.get("LIBRARY_PATH")
    return {"LIBRARY_PATH": f"{links}:{others}" if others else f"{links}"}
