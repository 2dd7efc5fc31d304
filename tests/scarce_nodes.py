"""Nodes of this machine for Ray's autoscaler, of which one group never comes.

A machine that a cloud does not have is, to Ray, a node that was asked for and stays
pending. Only that is added to Ray's own provider of fake nodes.
"""

import os
import time
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)


class ScarceNodes(FakeMultiNodeProvider):
    """Leaves nodes of group SCARCE_GROUP pending; says in SCARCE_LOG what it did."""

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: dict[str, str], *rest: Any
    ) -> None:
        if tags[TAG_RAY_USER_NODE_TYPE] != os.environ["SCARCE_GROUP"]:
            super()._create_node_with_resources_and_labels(node_config, tags, *rest)
            return
        with self.lock:
            name = self._next_hex_node_id()
            told = {
                TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
                TAG_RAY_NODE_NAME: name,
                TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
            }
            self._nodes[name] = {"tags": told | tags, "node": None}
        _note("asked")

    def _terminate_node(self, node: dict[str, Any]) -> None:
        if node["node"] is None:
            _note("withdrawn")
        else:
            super()._terminate_node(node)


def _note(what: str) -> None:
    with open(os.environ["SCARCE_LOG"], "a") as log:
        log.write(f"{time.time()} {what}\n")
