"""For processes that have this folder on their PYTHONPATH: see cost_notes.py.

Python imports only the first module of this name, so this one ends with the next, such as
that of tests/faulty.
"""

import importlib.machinery
import importlib.util
import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))

if "MEDRAY_COSTS" in os.environ:
    import cost_notes  # noqa: F401 -- it begins to watch

_others = [place for place in sys.path if os.path.abspath(place) != _HERE]
_next = importlib.machinery.PathFinder.find_spec("sitecustomize", _others)
if _next is not None and _next.loader is not None:
    _next.loader.exec_module(importlib.util.module_from_spec(_next))
