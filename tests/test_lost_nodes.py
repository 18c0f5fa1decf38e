"""A step that only a lost node could run waits for a while; what no node ever had is impossible at once."""

from typing import Any

from cluster.lost_nodes import LostNodes
from cluster.shape import ResourceShape


def node(name: str, alive: bool, gpus: float = 0.0, **labels: str) -> dict[str, Any]:
    # Of a dead node Ray keeps the labels only.
    resources = {"CPU": 4.0, "GPU": gpus} if alive else {}
    return {"NodeID": name, "NodeManagerHostname": name, "Alive": alive, "Resources": resources, "Labels": labels}


def test_a_lost_node_is_waited_for_when_it_could_run_the_step() -> None:
    lost = LostNodes()
    lost.note([node("a", True, gpus=1), node("b", True)])
    now = [node("a", False), node("b", True)]
    lost.note(now)
    assert lost.could_run(ResourceShape(gpus=1), now) == ["a"]
    assert lost.could_run(ResourceShape(gpus=2), now) == []


def test_a_node_whose_life_was_not_seen_may_have_had_enough() -> None:
    lost = LostNodes()
    now = [node("a", False, zone="east")]
    lost.note(now)
    assert lost.could_run(ResourceShape(gpus=8, labels={"zone": "east"}), now) == ["a"]
    assert lost.could_run(ResourceShape(gpus=8, labels={"zone": "west"}), now) == []


def test_a_node_that_is_long_gone_is_not_waited_for() -> None:
    lost = LostNodes(return_s=0.0)
    now = [node("a", False)]
    lost.note(now)
    assert lost.could_run(ResourceShape(), now) == []
