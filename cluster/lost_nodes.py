"""Nodes that were lost a moment ago: a step that only they could run waits for their return, it is not impossible."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cluster.shape import ResourceShape, fits

RETURN_S = 120.0
"""A node that is gone for longer is not waited for: time to restart a machine's container, or a cluster's node."""
_ANSWER_S = 10.0


class LostNodes:
    """What `ray.nodes()` forgets of a node that died: when that was, and what it had."""

    def __init__(self, return_s: float = RETURN_S) -> None:
        self._return_s = return_s
        self._resources: dict[str, Mapping[str, float]] = {}
        self._lost_at: dict[str, float] = {}

    def note(self, nodes: Iterable[Mapping[str, Any]], when: Callable[[], Mapping[str, float]]) -> None:
        """Remember the nodes of `ray.nodes()`. `when` is asked for `death_times` if one has died since the last time.

        One it does not tell of is lost now if its life was seen, else long gone.
        """
        dead = []
        for node in nodes:
            if node["Alive"]:
                self._resources[node["NodeID"]] = node["Resources"]
            elif node["NodeID"] not in self._lost_at:
                dead.append(node["NodeID"])
        died_at = when() if dead else {}
        for node_id in dead:
            now = time.time()
            # The clock of the head, which wrote the time down, may be ahead of ours.
            age_s = max(0.0, now - died_at.get(node_id, now if node_id in self._resources else 0.0))
            self._lost_at[node_id] = time.monotonic() - age_s

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


def death_times() -> dict[str, float]:
    """When the cluster's dead nodes died (Unix time, seconds), by node id: what `ray.nodes()` leaves out."""
    import ray

    found = ray._private.worker.global_worker.gcs_client.get_all_node_info(timeout=_ANSWER_S)
    return {node_id.hex(): node.end_time_ms / 1000 for node_id, node in found.items() if node.end_time_ms}
