"""AOTInductor: an exported network becomes a package for a device, in a folder."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import platform
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from medray.errors import ConfigError

OPTIONS = {
    "deterministic": True,
    "max_autotune": False,
    "cpp.threads": 1,
    "compile_threads": 1,
}
"""A package that is made again gives the same bits: no choice that rounds is made by
timing, and kernels for processors are of one thread, as the predictor's are. There are
no processes beside the one that compiles: they would stay, with memory of theirs."""


def write_package(program: Any, new: Path, device: torch.device, name: str) -> Path:
    """Compile an exported network; return the folder of its package.

    Args:
        program: Of torch.export.
        new: Empty folder, in which all lies that is written.
        device: Where it is to run.
        name: What the network is called in errors.

    Raises:
        ConfigError: It cannot be compiled, or there is no compiler.
        OSError: The folder cannot be written.
    """
    _check_compiler(name)
    from torch._inductor.utils import fresh_cache

    search = _cuda_links(new) if device.type == "cuda" else {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment(search))
        stack.enter_context(_cuda_headers() if search else contextlib.nullcontext())
        # With nothing of an earlier compilation, and nothing left for a later one.
        stack.enter_context(fresh_cache(dir=str(new), delete=False))
        try:
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(new / "network.pt2"),
                inductor_configs={**OPTIONS},  # which it adds to
            )
        except Exception as error:  # of torch, of Triton, of the compiler
            if (code := _code_of(error)) is not None:
                raise OSError(code, in_a_line(error)) from error
            raise ConfigError(
                f"compile: torch cannot compile {name} for {device}: "
                f"{in_a_line(error)}; give --compile off"
            ) from error
    package = new / "package"
    with zipfile.ZipFile(new / "network.pt2") as archive:
        archive.extractall(package)
    return package


def _code_of(error: BaseException) -> int | None:
    """Return why a compiler could not write, which it says in words alone."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    return next((code for code in codes if os.strerror(code) in str(error)), None)


def in_a_line(error: BaseException) -> str:
    """Return what an error says, on one line, without a compiler's command."""
    said = str(error).split("\nOutput:\n")[-1]
    return " ".join(f"{type(error).__name__}: {said}".split())[:300]


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
    """Show the compiler the headers that come with Triton, which comes with torch.

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
    """Return the folder of CUDA's headers that Triton brings; None: it brings none.

    PyTorch's own packages of CUDA lack some (crt/host_defines.h).
    """
    found = importlib.util.find_spec("triton")
    for place in (found.submodule_search_locations or ()) if found else ():
        home = Path(place, "backends", "nvidia")
        if (home / "include" / "cuda_runtime.h").exists():
            return home
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
