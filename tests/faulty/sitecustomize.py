"""A decoder with bugs, for processes that have this folder on their PYTHONPATH.

Tiles that hold a mark make it do what broken C libraries do: end the process, never come
back, or allocate without end. Everything else is as it is.
"""

import importlib.util
import os
import signal
import sys
import time


def _misbehave(data: bytes) -> None:
    if b"<CRASH>" in data:
        os.kill(os.getpid(), signal.SIGSEGV)
    if b"<HANG>" in data:
        time.sleep(10_000)
    if b"<EAT>" in data:
        eaten = []
        while True:
            eaten.append(bytearray(os.urandom(1 << 20) * 64))


class _Finder:
    def find_spec(self, name, path, target=None):
        if name != "medray.slides.tiff":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module) -> None:
            load(module)
            decode = module.TiffSlide._decode_into

            def faulty(self, raw, page, level, index, data, *where) -> None:
                _misbehave(data or b"")
                decode(self, raw, page, level, index, data, *where)

            module.TiffSlide._decode_into = faulty

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder())
