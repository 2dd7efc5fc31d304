"""Applications: commands, nightly runs, a service, a viewer, diagnostics.

What other rooms use stands in `__init__.pyi`; it is imported when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
