"""Where actors are put into their image: which nodes are asked, which are used, what is said when none can."""

import asyncio
from typing import Any

import pytest

from cluster.checks import NodeImage
from cluster.images import Images, ImagesUnfit
from cluster.room import Room
from cluster.shape import ResourceShape
from container.image_label import image_label

FIT = NodeImage(pinned="sha256:1", python="/usr/bin/python3", kit="/kit", host_python="/usr/bin/python3", root="/ours")
SHAPE = ResourceShape(image="torch:2", pinned="sha256:1")


class Cluster:
    """Nodes with one CPU each, and what they answer about the image."""

    def __init__(self, **answers: NodeImage | str) -> None:
        self.answers = {
            name: NodeImage(error=said) if isinstance(said, str) else said for name, said in answers.items()
        }
        self.labels: dict[str, str] = {}
        self.asked: list[str] = []
        self.images = Images(lambda: None, self._check)

    async def _check(self, node_id: str, name: str, pinned: str, gpus: bool) -> NodeImage:
        self.asked.append(node_id)
        await asyncio.sleep(0)
        return self.answers[node_id]

    @property
    def nodes(self) -> list[dict[str, Any]]:
        """As `ray.nodes()` gives them."""
        return [
            {
                "NodeID": name,
                "NodeManagerHostname": name,
                "Alive": True,
                "Resources": {"CPU": 1.0},
                "Labels": {"image": self.labels[name]} if name in self.labels else {},
            }
            for name in self.answers
        ]

    async def place(self, shape: ResourceShape = SHAPE, busy: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Where an actor may be placed; empty while nodes are being asked, and they have answered after that."""
        room = Room(self.nodes, {name: {"CPU": 0.0 if name in busy else 1.0} for name in self.answers})
        placing = self.images.placing(shape, self.nodes, room)
        await asyncio.sleep(0.01)
        return placing.node_ids if placing else ()


async def test_one_node_is_asked_and_used() -> None:
    cluster = Cluster(a=FIT, b=FIT)
    assert await cluster.place() == ()
    assert await cluster.place() == ("a",)
    assert cluster.asked == ["a"]


async def test_another_node_is_asked_when_the_first_is_busy() -> None:
    cluster = Cluster(a=FIT, b=FIT, c=FIT)
    await cluster.place()
    assert await cluster.place(busy=("a", "b")) == ("a",)
    assert await cluster.place(busy=("a", "b")) == ("a", "c")
    assert cluster.asked == ["a", "c"]


async def test_a_node_that_cannot_is_passed_over() -> None:
    cluster = Cluster(a="no engine", b=FIT)
    assert [await cluster.place() for _ in range(3)] == [(), (), ("b",)]


async def test_no_node_that_can_is_an_error_that_names_each() -> None:
    cluster = Cluster(a="no engine\n\nhint: start it", b="no such image\n\nhint: build it")
    cluster.labels["b"] = "other-image"
    await cluster.place()
    await cluster.place()
    with pytest.raises(ImagesUnfit) as caught:
        await cluster.place()
    text = str(caught.value)
    assert "image `torch:2`: `a` (label image=none): no engine; `b` (label image=other-image): no such image" in text
    assert text.endswith("hint: start it\n\nhint: build it")


async def test_a_gang_asks_as_many_nodes_as_it_needs() -> None:
    cluster = Cluster(a=FIT, b="no engine", c=FIT)
    shape = SHAPE.model_copy(update={"nodes": 2})
    assert [await cluster.place(shape) for _ in range(3)] == [(), (), ("a", "c")]
    assert cluster.asked == ["a", "b", "c"]


async def test_nodes_where_the_image_lies_elsewhere_are_not_mixed() -> None:
    cluster = Cluster(a=FIT, b=FIT.model_copy(update={"root": "/elsewhere"}))
    await cluster.place()
    await cluster.place(busy=("a",))
    assert await cluster.place(busy=("a",)) == ("a",)


async def test_the_name_is_looked_up_again_for_every_run() -> None:
    cluster = Cluster(a=FIT)
    shape = ResourceShape(image="torch:2")
    assert await cluster.images.pin(shape, cluster.nodes, 5) == "sha256:1"
    cluster.answers["a"] = FIT.model_copy(update={"pinned": "sha256:2"})
    assert await cluster.images.pin(shape, cluster.nodes, 5) == "sha256:2"
    assert await cluster.place() == ("a",)
    assert cluster.asked == ["a", "a"]


async def test_a_node_that_is_the_image_is_found_by_its_label() -> None:
    digest, other = "0123456789abcdef" * 4, "f" * 64
    cluster = Cluster(a=FIT, b=FIT)
    cluster.labels["b"] = label = image_label("own/torch:2", digest)
    for image, content_hash, pin in (
        ("own/torch:2", "", f"image={label}"),
        (f"own/torch:2@{digest}", "", f"image={label}"),
        ("a-second-name:1", digest, f"image={label}"),
        (label, "", f"image={label}"),
        (f"own/torch:2@{other}", "", "sha256:1"),
        ("own/torch:2", other, "sha256:1"),
        ("torch:2", "", "sha256:1"),
        (f"own/torch@sha256:{digest}", "", "sha256:1"),
    ):
        shape = ResourceShape(image=image, content_hash=content_hash)
        assert await cluster.images.pin(shape, cluster.nodes, 5) == pin
    cluster.labels["a"] = image_label("own/torch", other)
    with pytest.raises(ImagesUnfit, match="hint: write `image: own/torch:2@HASH`"):
        await cluster.images.pin(ResourceShape(image="own/torch:2"), cluster.nodes, 5)


async def test_the_second_actor_that_does_not_come_up_is_the_last() -> None:
    cluster = Cluster(a=FIT)
    await cluster.place()
    assert not cluster.images.refused(SHAPE)
    assert await cluster.place() == (), "what was known is found out anew"
    assert cluster.images.refused(SHAPE)
    cluster.images.came_up(SHAPE)
    assert not cluster.images.refused(SHAPE)
