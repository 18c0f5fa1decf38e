"""What the pool counts as one: a step actor, or all actors of a gang with the placement group that holds their nodes.

    one step actor   name                      on whichever node has room
    a gang           name.0, name.1, ...       one a node, by a placement group `name`: all of them or none

The placement group is detached, as the actors are: steps outlive the pool's process. Whoever stops a member removes it.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import get_placement_group, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actor import ActorState, StepActor
from cluster.connect import NAMESPACE
from cluster.images import Placing
from cluster.lease import Lease, Place
from cluster.shape import ResourceShape

_SMALLEST_BUNDLE = {"CPU": 0.001}
"""For a gang that asks for nothing but nodes: a placement group holds no empty bundle."""


class Member:
    """One step actor, or one gang."""

    def __init__(self, name: str, handles: Sequence[Any], shape: ResourceShape) -> None:
        self.name = name
        self.shape = shape
        self.places: tuple[Place, ...] = ()
        """Empty until every actor runs."""
        self.key = ""
        self.served = 0
        self.since = time.monotonic()
        """When its key was last changed."""
        self.died_at: float | None = None
        """When one of its actors was found dead while somebody held it."""
        self._handles = handles

    @classmethod
    def create(cls, name: str, shape: ResourceShape, placing: Placing | None) -> "Member":
        """Ask Ray for the actors; they start when their nodes have room. `placing` puts them into their image."""
        actor_class: Any = ray.remote(StepActor)
        common = {"namespace": NAMESPACE, "lifetime": "detached", "max_restarts": 0, "max_concurrency": 100}
        labels = shape.labels | (placing.labels if placing else {})
        if shape.nodes < 2:
            contained = placing.options(shape, name) if placing else {}
            options = {**shape.actor_options, "label_selector": labels or None, **contained}
            return cls(name, [actor_class.options(name=name, **common, **options).remote(name, shape)], shape)
        selectors = [labels] * shape.nodes if labels else None
        bundles: list[dict[str, float]] = [dict(shape.amounts) or dict(_SMALLEST_BUNDLE) for _ in range(shape.nodes)]
        group = placement_group(bundles, "STRICT_SPREAD", name, "detached", bundle_label_selector=selectors)
        options = {name: value for name, value in shape.actor_options.items() if name != "label_selector"}
        handles = []
        try:
            for rank in range(shape.nodes):
                own, strategy = actor_name(name, shape, rank), PlacementGroupSchedulingStrategy(group, rank)
                contained = placing.options(shape, own) if placing else {}
                actor = actor_class.options(name=own, scheduling_strategy=strategy, **common, **options, **contained)
                handles.append(actor.remote(own, shape))
        except BaseException:
            remove_placement_group(group)
            raise
        return cls(name, handles, shape)

    @property
    def runs(self) -> bool:
        """True once every actor runs."""
        return bool(self.places)

    @property
    def is_idle(self) -> bool:
        """True when it runs and nobody holds it."""
        return self.runs and not self.key

    @property
    def lease(self) -> Lease:
        """Itself, for the attempt that holds it."""
        return Lease(state="leased", places=self.places, fresh=self.served == 1)

    def hold(self, key: str) -> None:
        """Give it to an attempt, or take it back with an empty key."""
        self.key, self.since = key, time.monotonic()

    async def states(self, timeout_s: float | None = None) -> list[ActorState]:
        """What its actors say, in the order of their ranks. Raises Ray's errors, and `TimeoutError`."""
        asked = asyncio.gather(*(_answer(handle.state.remote()) for handle in self._handles))
        return await asyncio.wait_for(asked, timeout_s)

    def settle(self, states: Sequence[ActorState]) -> None:
        """Note where its actors are."""
        names = [actor_name(self.name, self.shape, rank) for rank in range(len(states))]
        self.places = tuple(
            Place(actor=name, node_id=state.node_id, folder=state.folder, address=state.address)
            for name, state in zip(names, states, strict=True)
        )

    def stop(self) -> None:
        """End its actors at once and give its nodes back."""
        for handle in self._handles:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(handle, no_restart=True)
        if self.shape.nodes > 1:
            remove_group(self.name)


def actor_name(member: str, shape: ResourceShape, rank: int) -> str:
    """Name of one of a member's actors."""
    return f"{member}.{rank}" if shape.nodes > 1 else member


def member_name(actor: str) -> str:
    """Name of the member that an actor belongs to."""
    return actor.partition(".")[0]


def remove_group(name: str) -> None:
    """Remove the placement group called `name`, if there is one."""
    with contextlib.suppress(RayError, ValueError):
        remove_placement_group(get_placement_group(name))


def group_names() -> set[str]:
    """Names of the placement groups of the cluster that are not removed."""
    return {group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"}


async def _answer(ref: Any) -> ActorState:
    state: ActorState = await ref
    return state
