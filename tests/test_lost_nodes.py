"""A step that only a lost node could run waits for a while; what no node ever had is impossible at once."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from cluster.lost_nodes import LostNodes, death_times
from cluster.shape import ResourceShape


def node(name: str, alive: bool, gpus: float = 0.0, **labels: str) -> dict[str, Any]:
    # Of a dead node Ray keeps the labels only.
    resources = {"CPU": 4.0, "GPU": gpus} if alive else {}
    return {"NodeID": name, "NodeManagerHostname": name, "Alive": alive, "Resources": resources, "Labels": labels}


def died(**ages_s: float) -> Callable[[], dict[str, float]]:
    """Answers as Ray when nodes died so many seconds ago; says nothing of others."""
    return lambda: {name: time.time() - age_s for name, age_s in ages_s.items()}


def test_a_lost_node_is_waited_for_when_it_could_run_the_step() -> None:
    lost = LostNodes()
    lost.note([node("a", True, gpus=1), node("b", True)], died())
    now = [node("a", False), node("b", True)]
    lost.note(now, died())
    assert lost.could_run(ResourceShape(gpus=1), now) == ["a"]
    assert lost.could_run(ResourceShape(gpus=2), now) == []


def test_a_node_whose_life_was_not_seen_may_have_had_enough() -> None:
    lost = LostNodes()
    now = [node("a", False, zone="east")]
    lost.note(now, died(a=5))
    assert lost.could_run(ResourceShape(gpus=8, labels={"zone": "east"}), now) == ["a"]
    assert lost.could_run(ResourceShape(gpus=8, labels={"zone": "west"}), now) == []


def test_a_node_that_is_long_gone_is_not_waited_for() -> None:
    lost = LostNodes(return_s=0.0)
    now = [node("a", False)]
    lost.note(now, died(a=0))
    assert lost.could_run(ResourceShape(), now) == []


def test_a_node_that_died_long_before_it_is_noted_is_not_waited_for() -> None:
    lost = LostNodes()
    lost.note([node("a", True)], died())
    now = [node("a", False), node("b", False), node("c", False)]
    lost.note(now, died(a=3600, b=3600))
    assert lost.could_run(ResourceShape(), now) == []


@pytest.mark.ray
async def test_a_cluster_tells_when_a_node_died(make_ray_head: Callable[[], Any]) -> None:
    from cluster.connect import connect
    from cluster.pool import open_pool

    head = make_ray_head()
    head.start()
    hidden = head.folder / "hidden"
    hidden.mkdir()
    head.join("127.0.0.4", hidden, "--num-cpus=1")
    await connect(head.address, head.token_file)
    import ray

    try:
        (node_id,) = [one["NodeID"] for one in ray.nodes() if one["NodeManagerAddress"] == "127.0.0.4"]
        (raylet,) = [one for one in head.processes("/raylet ") if "--node_ip_address=127.0.0.4" in one.cmdline()]
        raylet.kill()
        deadline = time.monotonic() + 60
        while node_id not in death_times():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        assert abs(time.time() - death_times()[node_id]) < 60
        pool: Any = open_pool("pool-lost", 60.0)
        lease = await pool.lease.remote("a", ResourceShape(cpus=999), 0.1)
        assert "waiting for a node to come back" in lease.text
    finally:
        ray.shutdown()
