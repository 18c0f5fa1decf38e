"""Nodes that were lost a moment ago: a step that only they could run waits for their return, it is not impossible."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from cluster.shape import ResourceShape, fits

RETURN_S = 120.0
"""A node that is gone for longer is not waited for: time to restart a machine's container, or a cluster's node."""


class LostNodes:
    """What Ray forgets of a node that died: when that was, and what it had."""

    def __init__(self, return_s: float = RETURN_S) -> None:
        self._return_s = return_s
        self._resources: dict[str, Mapping[str, float]] = {}
        self._lost_at: dict[str, float] = {}

    def note(self, nodes: Iterable[Mapping[str, Any]]) -> None:
        """Remember the nodes of `ray.nodes()`. A node whose life was not seen counts as lost when it is first noted."""
        for node in nodes:
            if node["Alive"]:
                self._resources[node["NodeID"]] = node["Resources"]
            else:
                self._lost_at.setdefault(node["NodeID"], time.monotonic())

    def could_run(self, shape: ResourceShape, nodes: Iterable[Mapping[str, Any]]) -> list[str]:
        """Names of the lost nodes that may come back and could run the shape."""
        now = time.monotonic()
        # Without knowledge of what it had, a node had enough.
        enough = {name: float("inf") for name in shape.amounts}
        return [
            str(node.get("NodeManagerHostname", "?"))
            for node in nodes
            if not node["Alive"]
            and now - self._lost_at.get(node["NodeID"], now) < self._return_s
            and fits(shape, self._resources.get(node["NodeID"], enough), node.get("Labels") or {})
        ]
