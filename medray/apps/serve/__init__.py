"""A model as an HTTP service on Ray Serve."""

import lazy_loader

# Ray Serve config files of users name it as `medray.apps.serve:build_app`.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"deployment": ["build_app"]}
)
