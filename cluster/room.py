"""What is free on each node at one time: whether a shape fits now, what is short, what others will leave of it."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from cluster.shape import ResourceShape, amount_text, fits, lacking, quantity


class Room:
    """A picture of the cluster to reckon with."""

    def __init__(self, nodes: Iterable[Mapping[str, Any]], free: Mapping[str, Mapping[str, float]]) -> None:
        """`nodes` as `ray.nodes()` gives them; `free` by node id."""
        self._total = {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}
        self._labels = {node["NodeID"]: node.get("Labels") or {} for node in nodes if node["Alive"]}
        self._free = {node_id: dict(free.get(node_id, {})) for node_id in self._total}

    def lacking(self, shape: ResourceShape) -> set[str]:
        """Names of the resources of which able nodes have too little free; empty when the shape fits now."""
        able = self._able(shape)
        short = [lacking(shape, self._free[node_id]) for node_id in able]
        return set() if short.count(set()) >= shape.num_nodes else set().union(*short)

    def fits(self, shape: ResourceShape) -> bool:
        """True when all of the shape's nodes could be had now."""
        return len(self._fitting(shape)) >= shape.num_nodes

    def without(self, shapes: Iterable[ResourceShape]) -> "Room":
        """What is left when an actor, or a gang, of each of these shapes has got its nodes too."""
        left = copy.copy(self)
        left._free = {node_id: dict(free) for node_id, free in self._free.items()}
        for shape in shapes:
            chosen = dict.fromkeys([*left._fitting(shape), *left._able(shape)])
            for node_id in list(chosen)[: shape.num_nodes]:
                left._add(node_id, shape, -1)
        return left

    def give(self, shape: ResourceShape, node_ids: Iterable[str]) -> None:
        """Reckon with the end of an actor, or a gang, that runs on these nodes."""
        for node_id in node_ids:
            self._add(node_id, shape, 1)

    def able(self, shape: ResourceShape) -> set[str]:
        """Ids of the nodes that could ever run the shape."""
        return set(self._able(shape))

    def fitting(self, shape: ResourceShape) -> list[str]:
        """Ids of the nodes that could run the shape now."""
        return self._fitting(shape)

    def text(self, shape: ResourceShape) -> str:
        """What of the shape is free, for people: `1 of 4 CPU free`."""
        able = self._able(shape)
        parts = []
        for name in sorted(shape.amounts):
            free, total = (sum(of[node_id].get(name, 0) for node_id in able) for of in (self._free, self._total))
            parts.append(f"{quantity(name, free)} of {amount_text(name, total)} free")
        if shape.nodes > 1:
            parts.insert(0, f"{len(self._fitting(shape))} of {len(able)} nodes have that free")
        return ", ".join(parts)

    def _able(self, shape: ResourceShape) -> list[str]:
        return [node_id for node_id, total in self._total.items() if fits(shape, total, self._labels[node_id])]

    def _fitting(self, shape: ResourceShape) -> list[str]:
        return [node_id for node_id in self._able(shape) if not lacking(shape, self._free[node_id])]

    def _add(self, node_id: str, shape: ResourceShape, sign: int) -> None:
        free = self._free.get(node_id)
        if free is not None:
            for name, amount in shape.amounts.items():
                free[name] = free.get(name, 0.0) + sign * amount
