"""Object stores by their addresses, and errors of storage in words.

Credentials come from where the provider's own tools look for them (environment, web
identity, instance role; ~/.aws with boto3 installed) and are never written anywhere.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError

from medray.errors import StoreError

# Half a minute of answers that say "later", or a minute without one.
_RETRY: Any = {"max_retries": 9, "retry_timeout": timedelta(seconds=90)}
_CLIENT: Any = {"timeout": timedelta(seconds=60), "connect_timeout": "10s"}

# What a file system of another machine answers that is out of reach.
_GONE = (errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN)
_AGAIN = "then run the same command again"


def locate(uri: str) -> tuple[Any, str]:
    """Return the obstore of an address's bucket, and the path in it.

    Raises:
        StoreError: There is no such kind of address, or a part of it cannot be.
    """
    scheme, _, rest = uri.partition("://")
    bucket, _, path = rest.partition("/")
    if scheme == "memory":
        bucket, path = "", rest
    path = path.strip("/")
    if any(part in (".", "..") for part in path.split("/")):
        raise StoreError(f"{uri}: an address has no parts . or ..")
    try:
        return _bucket(scheme, bucket), path
    except (BaseError, ValueError) as error:
        raise StoreError(
            f"{uri}: expected s3://, gs:// or az:// with a bucket ({_first(error)})"
        ) from error


@functools.lru_cache(maxsize=16)
def _bucket(scheme: str, bucket: str) -> Any:
    if scheme == "memory":
        return obstore.store.MemoryStore()
    options: dict[str, Any] = {}
    endpoint = os.environ.get("AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT", ""))
    client = _CLIENT | {"allow_http": True} if endpoint[:5] == "http:" else _CLIENT
    if scheme == "s3" and "AWS_ACCESS_KEY_ID" not in os.environ and _has_profile():
        from obstore.auth.boto3 import Boto3CredentialProvider

        options["credential_provider"] = Boto3CredentialProvider()
    return obstore.store.from_url(
        f"{scheme}://{bucket}", retry_config=_RETRY, client_options=client, **options
    )


def _has_profile() -> bool:
    """Return whether credentials lie in ~/.aws, which only boto3 can read."""
    folder = os.path.expanduser("~/.aws")
    return "AWS_PROFILE" in os.environ or any(
        os.path.exists(f"{folder}/{name}") for name in ("credentials", "config")
    )


@contextlib.contextmanager
def answered(uri: str, done: str = "read") -> Iterator[None]:
    """Turn what storage may answer into errors that say what to do.

    Args:
        uri: What is read or written; named in errors.
        done: What it cannot be, should that be so.

    Raises:
        FileNotFoundError: What was to be read is not there.
        StoreError: Anything else, when all retries are spent.
    """
    try:
        yield
    except (OSError, BaseError, ModuleNotFoundError) as error:
        if isinstance(error, FileNotFoundError) and done == "read":
            raise FileNotFoundError(
                errno.ENOENT, "there is no such file", uri
            ) from error
        raise StoreError(
            f"{uri}: cannot be {done} ({_first(error)}); {_advice(error)}, {_AGAIN}"
        ) from error


def _first(error: BaseException) -> str:
    """Return what matters of an error: obstore's say much, over many lines."""
    text = str(error).split("\n\nDebug source")[0]
    return " ".join(text.split())[:300]


def _advice(error: BaseException) -> str:
    code = getattr(error, "errno", None)
    said = str(error)
    if isinstance(error, ModuleNotFoundError):
        return "pip install 'medray[s3]' to use ~/.aws"
    denied = isinstance(error, PermissionError | PermissionDeniedError)
    if denied or code == errno.EROFS or "Expired" in said:
        if code:
            return "give this user permission or choose another place"
        return "check the credentials in the environment and what they permit"
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free space or choose another place"
    if code == errno.ENOTDIR:
        return "choose another place"
    return "see that it can be reached"


def is_of_one_file(error: StoreError) -> bool:
    """Return whether an error is about one file, not about its whole store."""
    cause = error.__cause__
    if isinstance(cause, OSError):
        return cause.errno not in _GONE
    return isinstance(cause, PermissionDeniedError)
