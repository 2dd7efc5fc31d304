"""Objects of a Kubernetes API server, as JSON.

https://kubernetes.io/docs/reference/kubernetes-api/
"""

from __future__ import annotations

import json
from typing import Any

Object = dict[str, Any]

_ANSWER_S = 10.0


class ForbiddenError(Exception):
    """This user may not look at something."""


class Cluster:
    """The API server of a cluster, asked for JSON."""

    def __init__(self, api: Any, namespace: str) -> None:
        """Take a client of package `kubernetes`, and where medray is."""
        self._api, self.namespace = api, namespace

    def get(self, path: str) -> Object | None:
        """Return what is at a path; None: nothing.

        Raises:
            ForbiddenError: This user may not see it.
            OSError: The server does not answer, or not with that.
        """
        try:
            text = self._api.call_api(
                path,
                "GET",
                header_params={"Accept": "application/json"},
                auth_settings=["BearerToken"],
                _preload_content=False,
                _return_http_data_only=True,
                _request_timeout=_ANSWER_S,
            ).data
        except Exception as error:  # of urllib3, which has many, and ApiException
            status = getattr(error, "status", None)
            if status == 404:
                return None
            if status in (401, 403):
                raise ForbiddenError(path) from error
            raise OSError(f"{path}: {error}") from error
        found: Object = json.loads(text)
        return found

    def items(self, path: str) -> list[Object]:
        """Return the objects of a list; none where there is no such kind."""
        found: list[Object] = (self.get(path) or {}).get("items", [])
        return found

    def mine(self, kind: str, group: str = "api/v1") -> list[Object]:
        """Return medray's objects of a kind, such as `pods`."""
        return self.items(f"/{group}/namespaces/{self.namespace}/{kind}")

    def ray_cluster(self) -> Object | None:
        """Return the RayCluster that nights run on; None: there is none."""
        group = "/apis/ray.io/v1"
        return self.get(f"{group}/namespaces/{self.namespace}/rayclusters/medray")
