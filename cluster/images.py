"""What the pool knows of images: which nodes can run which, and how an actor is put into one.

    Attempt --lease(shape without pin)--> Images.pin    what the name stands for in this run
    Pool ------------placing(shape)-----> Images        the nodes where the image was checked, and the worker's command
                                            '- a task `check_image` on a node, when none of those is known or has room

A node that runs inside the image itself, by its label `image`, takes the step directly: its pin is the label's value.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cluster.checks import NodeImage, check_image
from cluster.plan_copies import copies_folder
from cluster.room import Room
from cluster.shape import IMAGE_LABEL, ResourceShape, fits
from container.image_label import image_label
from container.worker import WorkerSpec, command

log = logging.getLogger(__name__)

NODE_LABEL = "ray.io/node-id"
"""Label that Ray itself gives every node."""
_GOOD_FOR_S = 60.0
"""An image that was found fit is looked at again after so long: it may have been removed."""
_BAD_FOR_S = 5.0
"""One that was not may be built or pulled any moment."""
_CHECK_TIMEOUT_S = 2400.0
"""Longer than a pull may take."""
_MOST_REFUSALS = 2
_FIT = "fit, but too few others are set up like it: the user, the paths of Python and our packages, the GPUs"


class ImagesUnfit(Exception):
    """No node that has what the shape asks for can run it in its image; the text says why for each."""


class Placing(NamedTuple):
    """How an actor is put into its image."""

    node_ids: tuple[str, ...]
    """Where it may be placed."""
    image: NodeImage
    """The image there: the same on all of these nodes."""

    def options(self, shape: ResourceShape, actor: str) -> dict[str, Any]:
        """Ray options of one actor, in addition to the shape's own."""
        spec = WorkerSpec(
            actor=actor,
            image_id=shape.pinned,
            python=self.image.python,
            kit=self.image.kit,
            folder=f"{self.image.attempts}/{actor}",
            copies=str(copies_folder(Path(self.image.attempts))),
            mounts=shape.mounts,
            project=shape.project,
            root=shape.root,
            secrets=shape.secrets,
            own_secrets=shape.own_secrets,
            cpus=shape.container_cpus,
            memory=shape.memory,
            devices=self.image.devices if shape.gpus else (),
        )
        return {"runtime_env": {"py_executable": command(spec, self.image.host_python, self.image.root)}}

    @property
    def labels(self) -> dict[str, str]:
        """Labels its node must have, in addition to the shape's own."""
        return {NODE_LABEL: f"in({','.join(self.node_ids)})"}


class _Answer(NamedTuple):
    image: NodeImage
    at: float

    @property
    def is_stale(self) -> bool:
        return time.monotonic() - self.at > (_BAD_FOR_S if self.image.error else _GOOD_FOR_S)


Check = Callable[[str, str, str, bool], Awaitable[NodeImage]]
"""Asks a node, by its id, as `check_image` is asked."""

_Question = tuple[str, str, bool, str]
"""Name, pin, whether with GPUs, node id: the arguments of `check_image` and where."""


class Images:
    """Questions to nodes and their answers."""

    def __init__(self, on_answer: Callable[[], object], check: Check | None = None) -> None:
        """`on_answer` is called when a node has answered. `check` asks it, by default with a Ray task."""
        self._on_answer = on_answer
        self._check = check or _check_on_node
        self._answers: dict[_Question, _Answer] = {}
        self._asking: dict[_Question, asyncio.Task[NodeImage]] = {}
        self._refusals: dict[str, int] = {}

    async def pin(self, shape: ResourceShape, nodes: Iterable[Mapping[str, Any]], wait_s: float) -> str:
        """What the image of `shape` stands for, empty when that takes longer than `wait_s`. Raises `ImagesUnfit`."""
        alive = [node for node in nodes if node["Alive"]]
        able = [node for node in alive if fits(shape, node["Resources"], node.get("Labels") or {})]
        if value := _label_of(shape, able):
            return f"{IMAGE_LABEL}={value}"
        deadline = time.monotonic() + wait_s
        for node in able:
            try:
                asked = asyncio.shield(self._ask(shape, node["NodeID"]))
                found = await asyncio.wait_for(asked, deadline - time.monotonic())
            except TimeoutError:
                return ""
            if not found.error:
                return found.pinned
        raise ImagesUnfit(self._reasons(shape, alive, [node["NodeID"] for node in able]))

    def placing(self, shape: ResourceShape, nodes: Iterable[Mapping[str, Any]], room: Room) -> Placing | None:
        """Where and how an actor of `shape` is started now; None while that is being found out, or without a container.

        Raises `ImagesUnfit`.
        """
        if not shape.is_contained:
            return None
        able, fitting = sorted(room.able(shape)), room.fitting(shape)
        known = {node_id: found for node_id in able if (found := self._known(shape, node_id))}
        unknown = [node_id for node_id in able if node_id not in known]
        good = _alike(known, fitting, shape.num_nodes)
        if len(good) + len(unknown) < shape.num_nodes:
            raise ImagesUnfit(self._reasons(shape, [node for node in nodes if node["Alive"]], able))
        if len(set(fitting) & set(good)) < shape.num_nodes:
            # Look at nodes with room first, and at no more than are needed.
            unknown.sort(key=lambda node_id: node_id not in fitting)
            wanted = [each for each in unknown if each in fitting or len(good) < shape.num_nodes][: shape.num_nodes]
            for node_id in wanted:
                self._ask(shape, node_id)
        return Placing(tuple(good), known[good[0]]) if len(good) >= shape.num_nodes else None

    def refused(self, shape: ResourceShape) -> bool:
        """An actor did not come up in its image: True when the next try is no use. What is known is found out anew."""
        for question in [each for each in self._answers if each[:2] == (shape.image, shape.pinned)]:
            del self._answers[question]
        self._refusals[shape.identity] = self._refusals.pop(shape.identity, 0) + 1
        return self._refusals[shape.identity] >= _MOST_REFUSALS

    def came_up(self, shape: ResourceShape) -> None:
        """An actor came up in its image."""
        self._refusals.pop(shape.identity, None)

    def _known(self, shape: ResourceShape, node_id: str) -> NodeImage | None:
        answer = self._answers.get(_question(shape, node_id))
        return None if answer is None or answer.is_stale else answer.image

    def _ask(self, shape: ResourceShape, node_id: str) -> "asyncio.Task[NodeImage]":
        """Ask a node, unless it was asked already."""
        question = _question(shape, node_id)
        task = self._asking.get(question)
        if task is None:
            task = self._asking[question] = asyncio.get_running_loop().create_task(self._answer(question))
        return task

    async def _answer(self, question: _Question) -> NodeImage:
        name, pinned, gpus, node_id = question
        try:
            found = await self._check(node_id, name, pinned, gpus)
            self._answers[name, found.pinned or pinned, gpus, node_id] = _Answer(found, time.monotonic())
            return found
        finally:
            del self._asking[question]
            self._on_answer()

    def _reasons(self, shape: ResourceShape, alive: Iterable[Mapping[str, Any]], able: Iterable[str]) -> str:
        parts, hints = [], []
        for node in alive:
            host = f"`{node.get('NodeManagerHostname', '?')}`"
            known = self._answers.get(_question(shape, node["NodeID"]))
            if node["NodeID"] not in able:
                parts.append(f"{host} has not what else the step asks for")
            elif known is not None:
                text, _, hint = (known.image.error or _FIT).partition("\n\n")
                parts.append(f"{host} (label {IMAGE_LABEL}={_label(node) or 'none'}): {text}")
                hints += [hint] if hint and hint not in hints else []
        none = "no node" if shape.num_nodes == 1 else "too few nodes"
        what = f"{none} of the Ray cluster can run the step in image `{shape.image}`"
        return "\n\n".join([f"{what}: {'; '.join(parts)}", *hints])


async def _check_on_node(node_id: str, name: str, pinned: str, gpus: bool) -> NodeImage:
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    affinity = NodeAffinitySchedulingStrategy(node_id, soft=False)
    remote: Any = ray.remote(num_cpus=0, max_retries=0)(check_image)
    try:
        ref = remote.options(scheduling_strategy=affinity).remote(name, pinned, gpus)
        found: NodeImage = await asyncio.wait_for(ref, _CHECK_TIMEOUT_S)
    except (RayError, TimeoutError) as error:
        log.warning("image %s could not be checked on node %s: %s", name, node_id, error)
        return NodeImage(error=f"it could not be checked: {str(error).partition(chr(10))[0] or type(error).__name__}")
    return found


def _alike(known: Mapping[str, NodeImage], fitting: Collection[str], wanted: int) -> list[str]:
    """Nodes where the image is the same in all: `wanted` ones if there are so many, of which most have room."""
    fit = {node_id: image for node_id, image in known.items() if not image.error}
    groups = [[node_id for node_id in fit if fit[node_id] == image] for image in fit.values()]

    def rank(group: Collection[str]) -> tuple[int, int, int]:
        return min(len(group), wanted), min(len(set(group) & set(fitting)), wanted), len(group)

    return max(groups, key=rank, default=[])


def _question(shape: ResourceShape, node_id: str) -> _Question:
    name = f"{shape.image}@{shape.content_hash}" if shape.content_hash else shape.image
    return name, shape.pinned, bool(shape.gpus), node_id


def _label(node: Mapping[str, Any]) -> str:
    return str((node.get("Labels") or {}).get(IMAGE_LABEL, ""))


def _label_of(shape: ResourceShape, nodes: Iterable[Mapping[str, Any]]) -> str:
    """The label of nodes that run in the shape's image, empty when there are none. Raises `ImagesUnfit`.

    A label has the repository and the hash, but no tag. Without a hash to go by, the repository must do.
    """
    name, _, given = shape.image.partition("@")
    digest = shape.content_hash or ("" if given.startswith("sha256:") else given)
    wanted = image_label(name, digest or "0" * 64)
    values = sorted({_label(node) for node in nodes} - {""})
    if shape.image in values:
        return shape.image
    if digest:
        return next((value for value in values if value.rpartition("-")[2] == wanted.rpartition("-")[2]), "")
    found = [value for value in values if value.rpartition("-")[0] == wanted.rpartition("-")[0]]
    if len(found) > 1 and not given:
        raise ImagesUnfit(
            f"image `{shape.image}` may be any of those that nodes of the Ray cluster run in: {', '.join(found)}\n\n"
            f"hint: write `image: {name}@HASH`, the hash being what follows the last `-`"
        )
    return found[0] if found and not given else ""
