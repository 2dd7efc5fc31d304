"""A model as an HTTP service on Ray Serve."""

from medray.apps.serve.deployment import build_app

# Ray Serve config files of users name it as `medray.apps.serve:build_app`.
__all__ = ["build_app"]
