"""Settings of a service, and the token that requests must carry."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from medray.apps.serve.api import token_digest
from medray.apps.serve.requests import Bounds
from medray.errors import ConfigError, StoreError
from medray.models import Compile, Precision
from medray.storage import files

TOKEN = "MEDRAY_SERVE_TOKEN"
"""The environment variable of the token that requests must carry."""

LEAST_TOKEN = 16  # characters


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Settings of a service; the `args` of a Serve config file.

    Attributes:
        model: Folder of the model.
        report: Report of `medray evaluate` of a classifier of images, for its
            temperature.
        precision: Precision of the model's arithmetic.
        compile: Compile the network for the device; auto: for a GPU.
        min_replicas: Least number of replicas.
        max_replicas: Greatest number of replicas.
        cpus: Cores per replica; 0: equal shares of the smallest node.
        gpus: GPUs per replica; -1: one if the cluster has any.
        bounds: Limits of a request.
        token_file: File of the token, if the environment has none.
    """

    model: str
    report: str = ""
    precision: Precision = "auto"
    compile: Compile = "auto"
    min_replicas: int = 1
    max_replicas: int = 1
    cpus: int = 0
    gpus: int = -1
    bounds: Bounds = field(default_factory=Bounds)
    token_file: str = ""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(
                f"replicas: expected 1 or more, and at most the greatest number, found "
                f"{self.min_replicas} to {self.max_replicas}"
            )


def read_token(path: str) -> str:
    """Return the digest of the token; "" if there is none.

    Raises:
        ConfigError: The token is too short, or its file cannot be read.
    """
    token = os.environ.get(TOKEN, "")
    if path:
        try:
            token = files.read_bytes(path).decode().strip()
        except (OSError, StoreError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--token-file {path}: cannot be read: {error}"
            ) from error
    if (path or token) and len(token) < LEAST_TOKEN:
        raise ConfigError(
            f"the token has {len(token)} characters, expected {LEAST_TOKEN} or more; "
            f'make one with python -c "import secrets; print(secrets.token_urlsafe())"'
        )
    return token_digest(token) if token else ""
