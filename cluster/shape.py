"""The noun of placement: what a step asks of a node, and whether a node can ever give it."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from steps import Frozen

Amount = Annotated[float, Field(ge=0)]
IMAGE_LABEL = "image"
"""Node label that says in which image the node itself runs; its value is made by `container.image_label`."""


def _whole_above_one(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(f"got {gpus:g} GPUs, wanted a part of one or whole ones")
    return gpus


class ResourceShape(Frozen):
    """What a step needs from its node. Two steps of equal shape may share a warm actor."""

    nodes: Annotated[int, Field(ge=0)] = 0
    """Nodes of a gang; each gives all that is asked for here. 0 is a step that is no gang."""
    cpus: Amount = 1.0
    """CPU cores; fractions are allowed."""
    gpus: Annotated[Amount, AfterValidator(_whole_above_one)] = 0.0
    """GPUs; a part of one, or whole ones."""
    memory: Annotated[int, Field(ge=0)] = 0
    """Bytes; 0 asks for none in particular."""
    labels: dict[str, str] = {}
    """Ray node labels the node must have, as Ray's label selectors: `v`, `!v`, `in(a,b)`, `!in(a,b)`."""
    custom: dict[str, Amount] = {}
    """Custom Ray resources and how much of each."""
    image: str = ""
    """Container image the step's actor runs in; empty is the node's own Python."""
    content_hash: str = ""
    """Hash of our own `image` on the worker's machine, see `cluster.pins`; asked for until the image is pinned."""
    pinned: str = ""
    """What `image` stands for in the run, see `cluster.pins`; set, as the six below, where an attempt is sent out."""
    mounts: tuple[str, ...] = ()
    """Folders of the node that its container sees at the same path; the first is also its `/workspace`."""
    project: str = ""
    """Whose caches its container sees, when the step's `env` says it; see `container.mounts`, as of the next."""
    root: str = ""
    """Where those caches are on the node, when the step's `env` says it."""
    secrets: tuple[str, ...] = ()
    """Names of the secrets that its container may see."""
    own_secrets: str = ""
    """Folder of those that came with the run, when there are any: the actor then serves no other run."""
    secrets_version: str = ""
    """Another one when one of them is set anew: an actor keeps those it was started with."""
    actor: str = ""
    """Name of an actor that serves, one after another, all steps that name it and ask for the same."""
    actor_scope: str = ""
    """Folder of the plan whose steps share the `actor`; set where an attempt is sent to the cluster."""

    @property
    def num_nodes(self) -> int:
        """Different nodes it takes at the same time."""
        return max(1, self.nodes)

    @property
    def identity(self) -> str:
        """Short hash, equal for equal shapes."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    @property
    def amounts(self) -> dict[str, float]:
        """Ray resource name -> amount, without zeros."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, "memory": float(self.memory), **self.custom}
        return {name: amount for name, amount in wanted.items() if amount}

    @property
    def actor_options(self) -> dict[str, Any]:
        """The same as Ray actor options."""
        options: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus, "resources": dict(self.custom)}
        if self.memory:
            options["memory"] = self.memory
        if self.labels:
            options["label_selector"] = dict(self.labels)
        return options

    @property
    def is_contained(self) -> bool:
        """True when its actor runs in a container of its own; False too for a node that runs in the image."""
        return bool(self.pinned) and not self.pinned.startswith(f"{IMAGE_LABEL}=")

    @property
    def container_cpus(self) -> float:
        """Limit of the step's container in cores, 0 is none.

        One core is what a step gets that does not say; with a GPU it would starve that, and is no limit.
        """
        return 0.0 if self.gpus and self.cpus <= 1 else self.cpus

    @property
    def image_text(self) -> str:
        """The image and what it stands for in the run, for reports: `name@sha256:...`."""
        return "@".join(filter(None, [self.image, self.pinned.rpartition("@")[2].removeprefix(f"{IMAGE_LABEL}=")]))

    @property
    def thread_environment(self) -> dict[str, str]:
        """Variables that keep numeric libraries to the CPUs asked for; without them each starts a thread per core.

        None for a step with a GPU, which seldom says how many CPUs it uses. What a plan declares in `env` wins.
        """
        return {} if self.gpus or not self.cpus else {"OMP_NUM_THREADS": str(max(1, int(self.cpus)))}

    def __str__(self) -> str:
        parts = [amount_text(name, amount) for name, amount in self.amounts.items()]
        parts += [f"label {name}={value}" for name, value in self.labels.items()]
        parts += [f"image `{self.image}`"] if self.image else []
        text = ", ".join(parts) or "nothing in particular"
        return f"{self.nodes} nodes, each with {text}" if self.nodes > 1 else text


def fits(shape: ResourceShape, amounts: Mapping[str, float], labels: Mapping[str, str]) -> bool:
    """True when a node with these resources and labels could run the shape."""
    return not lacking(shape, amounts) and all(
        _label_matches(selector, labels.get(name)) for name, selector in shape.labels.items()
    )


def lacking(shape: ResourceShape, amounts: Mapping[str, float]) -> set[str]:
    """Names of the resources of which there is too little."""
    return {name for name, amount in shape.amounts.items() if amounts.get(name, 0.0) + 1e-9 < amount}


def why_infeasible(shape: ResourceShape, nodes: Iterable[Mapping[str, Any]]) -> str:
    """Sentence for people when the living nodes (of `ray.nodes()`) could never run the shape; else an empty text."""
    alive = [node for node in nodes if node["Alive"]]
    able = [node for node in alive if fits(shape, node["Resources"], node.get("Labels") or {})]
    if len(able) >= shape.num_nodes:
        return ""
    offers = "; ".join(_offer(node, shape) for node in alive) or "no node"
    can = "no node of the Ray cluster can ever give what the step asks for"
    if able:
        can = f"{len(able)} of the {shape.nodes} nodes the step asks for can ever be had in the Ray cluster"
    return f"{can}: wanted {shape}, there is {offers}\n\nhint: ask for less, or add a node that has it"


def _offer(node: Mapping[str, Any], shape: ResourceShape) -> str:
    names = sorted({"CPU", "GPU", *shape.amounts})
    parts = [amount_text(name, node["Resources"].get(name, 0)) for name in names]
    labels = node.get("Labels") or {}
    parts += [f"label {name}={labels[name]}" if name in labels else f"no label {name}" for name in shape.labels]
    return f"`{node.get('NodeManagerHostname', '?')}` with {', '.join(parts)}"


def amount_text(name: str, amount: float) -> str:
    """An amount of a Ray resource for people: `2 CPU`, `16.9 GB memory`."""
    return f"{quantity(name, amount)} {'GB memory' if name == 'memory' else name}"


def quantity(name: str, amount: float) -> str:
    """The number alone: GB for memory, else the amount as it is."""
    return f"{round(amount / 1e9, 3):g}" if name == "memory" else f"{amount:g}"


def _label_matches(selector: str, value: str | None) -> bool:
    if selector.startswith("!"):
        return not _label_matches(selector[1:], value)
    if selector.startswith("in(") and selector.endswith(")"):
        return value in [choice.strip() for choice in selector[3:-1].split(",")]
    return value == selector
