"""Compile an exported network for a device into a package (AOTInductor)."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import itertools
import os
import platform
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from medray.errors import CompileError

OPTIONS = {
    "deterministic": True,
    "max_autotune": False,
    "cpp.threads": 1,
    "compile_threads": 1,
}
"""Options under which a package that is compiled again gives the same bits: kernels are
not chosen by timing where that changes rounding, and CPU kernels use one thread, as the
predictor does. No further compiler processes: they would stay alive and keep memory."""


def write_package(program: Any, new: Path, device: torch.device, name: str) -> Path:
    """Compile an exported network; return the folder of its package.

    Args:
        program: The network, from torch.export.
        new: Empty folder that receives all files.
        device: Device that it will run on.
        name: Name of the network in errors.

    Raises:
        CompileError: The network cannot be compiled, or there is no compiler.
        OSError: The folder cannot be written.
    """
    _check_compiler(name)
    from torch._inductor.utils import fresh_cache

    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(cuda_toolkit(new))
        # Start without state of an earlier compilation, and leave none.
        stack.enter_context(fresh_cache(dir=str(new), delete=False))
        try:
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(new / "network.pt2"),
                inductor_configs={**OPTIONS},  # which it adds to
            )
        except Exception as error:  # of torch, of Triton, of the compiler
            if (code := _code_of(error)) is not None:
                said = f"{os.strerror(code)}: {in_a_line(error)}"
                raise OSError(code, said) from error
            raise CompileError(
                f"compile: torch cannot compile {name} for {device}: "
                f"{in_a_line(error)}; give --compile off"
            ) from error
    package = new / "package"
    with zipfile.ZipFile(new / "network.pt2") as archive:
        archive.extractall(package)
    return package


def _code_of(error: BaseException) -> int | None:
    """Return the OSError behind a compiler's message, which is only text."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    return next((code for code in codes if os.strerror(code) in str(error)), None)


def in_a_line(error: BaseException) -> str:
    """Return an error's message on one line, without the compiler's command."""
    said = str(error).split("\nOutput:\n")[-1]
    return " ".join(f"{type(error).__name__}: {said}".split())[:300]


def _check_compiler(name: str) -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise CompileError(
            f"compile: {name} is to be compiled, and there is no C++ compiler "
            f"{compiler} on this machine ({platform.node()}); install one (Debian: "
            f"apt-get install g++), name one in CXX, or give --compile off"
        )


# --- CUDA -----------------------------------------------------------------------------


@contextlib.contextmanager
def cuda_toolkit(new: Path) -> Iterator[None]:
    """Let compiler and linker find CUDA's headers and libraries on any machine.

    A machine may have no CUDA toolkit, or another version, so the headers are those of
    Triton and of the package `cccl`, both installed with torch; other CUDA packages of
    torch lack some (crt/host_defines.h). Drivers often lack the file name that a linker
    looks for (libcuda.so), although torch has loaded the library.
    """
    from torch.utils import cpp_extension

    links = new / "driver"
    links.mkdir()
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if os.path.basename(path).startswith("libcuda.so"):
            (links / "libcuda.so").symlink_to(path)
            break
    search = {"LIBRARY_PATH": str(links)}
    for target in _packaged("nvidia", "**/include/**/nv/target"):
        search["CPATH"] = str(target.parent.parent)
    before = cpp_extension.CUDA_HOME
    for header in _packaged("triton", "backends/nvidia/include/cuda_runtime.h"):
        cpp_extension.CUDA_HOME = str(header.parent.parent)
    try:
        with _environment(search):
            yield
    finally:
        cpp_extension.CUDA_HOME = before


def _packaged(package: str, pattern: str) -> Iterator[Path]:
    """Yield the first existing file of an installed package."""
    found = importlib.util.find_spec(package)
    for place in (found.submodule_search_locations or ()) if found else ():
        yield from itertools.islice(sorted(Path(place).glob(pattern)), 1)


@contextlib.contextmanager
def _environment(first: dict[str, str]) -> Iterator[None]:
    """Put paths first in environment variables of search paths."""
    before = {name: os.environ.get(name) for name in first}
    for name, path in first.items():
        os.environ[name] = os.pathsep.join(filter(None, (path, before[name])))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
