"""The pool on a real Ray head: leases by key, warm actors, room for other shapes, and its own death."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from cluster.shape import ResourceShape, fits, lacking, why_infeasible
from steps import StepRequest

pytestmark = [pytest.mark.ray, pytest.mark.asyncio(loop_scope="module")]

SLOT = ResourceShape(cpus=0, custom={"slot": 1})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def driver(ray_head: Any) -> AsyncIterator[Any]:
    from cluster.connect import connect

    await connect(ray_head.address, ray_head.token_file)
    await connect(ray_head.address, ray_head.token_file)
    import ray

    yield ray
    ray.shutdown()


class Client:
    """Calls one pool as a driver does."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.keys: set[str] = set()

    async def lease(self, key: str, shape: ResourceShape = SLOT, wait_s: float = 60) -> Any:
        self.keys.add(key)
        return await asyncio.wait_for(self.pool.lease.remote(key, shape, wait_s), 120)

    async def release(self, key: str, *, discard: bool = False) -> None:
        await asyncio.wait_for(self.pool.release.remote(key, discard), 60)

    async def members(self) -> list[dict[str, Any]]:
        return list(await asyncio.wait_for(self.pool.members.remote(), 60))


@pytest_asyncio.fixture(loop_scope="module")
async def client(driver: Any) -> AsyncIterator[Client]:
    from cluster.pool import open_pool

    client = Client(open_pool(f"pool-{uuid.uuid4().hex[:8]}", 60.0))
    yield client
    for key in client.keys:
        await client.release(key, discard=True)
    for member in await client.members():
        driver.kill(driver.get_actor(member["actor"], "orchestrate"), no_restart=True)
    driver.kill(client.pool, no_restart=True)


async def test_a_lease_is_found_again_by_its_key(client: Client) -> None:
    first = await client.lease("a")
    again = await client.lease("a")
    other = await client.lease("b")
    assert (first.state, first.fresh, other.state) == ("leased", True, "leased")
    assert again.actor == first.actor != other.actor


async def test_a_released_actor_goes_to_the_one_who_waits(client: Client) -> None:
    first, _ = await asyncio.gather(client.lease("a"), client.lease("b"))
    waiting = await client.lease("c", wait_s=0.5)
    assert waiting.state == "waiting"
    assert "0 of 2 slot free" in waiting.text
    await client.release("a")
    third = await client.lease("c")
    assert (third.actor, third.fresh) == (first.actor, False)


async def test_an_idle_actor_makes_room_for_another_shape(client: Client) -> None:
    first = await client.lease("a")
    await client.release("a")
    both = await client.lease("b", ResourceShape(cpus=0, custom={"slot": 2}))
    assert both.state == "leased"
    assert first.actor not in {member["actor"] for member in await client.members()}


async def test_a_discarded_actor_is_not_used_again(client: Client) -> None:
    first = await client.lease("a")
    await client.release("a", discard=True)
    assert (await client.lease("b")).actor != first.actor


def long_step() -> StepRequest:
    return StepRequest(
        workflow_id="flow",
        run_id="run",
        step_id=uuid.uuid4().hex,
        step_name="step",
        attempt=1,
        type="command",
        params={"command": "sleep", "args": ["600"]},
        plan_dir="/tmp",
        working_dir="/tmp",
        log_dir="/tmp",
        timeout_s=600,
        grace_s=0.2,
    )


async def test_an_attempt_that_was_given_up_ends_before_the_next_one_starts(client: Client, driver: Any) -> None:
    from cluster.attempt_folder import Cursor

    request = long_step()
    step = request.step_key
    first, other = await asyncio.gather(client.lease(request.key), client.lease(f"{step}-other/1"))
    actor = driver.get_actor(first.actor, "orchestrate")
    await actor.start.remote(request, Cursor(), 0)
    assert (await client.lease(request.key)).actor == first.actor, "its own attempt finds it"
    assert (await client.lease(f"{step}/0", wait_s=0.5)).state == "waiting", "an earlier attempt ends nothing"
    await client.release(f"{step}/0")
    second = await client.lease(f"{step}/2", wait_s=30)
    assert (second.state, second.fresh) == ("leased", True)
    with pytest.raises(driver.exceptions.RayActorError):
        await asyncio.wait_for(actor.state.remote(), 30)
    assert (await client.lease(f"{step}-other/1")).actor == other.actor
    assert {member["key"] for member in await client.members()} == {f"{step}/2", f"{step}-other/1"}


async def test_leases_survive_the_pools_death(client: Client, ray_head: Any, driver: Any) -> None:
    from cluster.attempt_folder import Cursor

    request = long_step()
    lease = await client.lease(request.key)
    idle = await client.lease("idle")
    await client.release("idle")
    actor = driver.get_actor(lease.actor, "orchestrate")
    await actor.start.remote(request, Cursor(), 0)
    before = ray_head.processes("ray::Pool")
    for process in before:
        process.kill()
    assert (await client.lease(request.key)).actor == lease.actor
    assert (await client.lease("other")).actor == idle.actor
    await actor.cancel.remote(request.key)


async def test_a_dead_idle_actor_is_noticed(client: Client, driver: Any) -> None:
    lease = await client.lease("a")
    await client.release("a")
    driver.kill(driver.get_actor(lease.actor, "orchestrate"), no_restart=True)
    deadline = time.monotonic() + 60
    while await client.members():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)


async def test_idle_actors_are_stopped_after_their_time(driver: Any) -> None:
    from cluster.pool import open_pool

    client = Client(open_pool(f"pool-{uuid.uuid4().hex[:8]}", 0.5))
    await client.lease("a")
    await client.release("a")
    deadline = time.monotonic() + 60
    while await client.members():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)
    driver.kill(client.pool, no_restart=True)


async def test_what_cannot_be_is_said_at_once(client: Client) -> None:
    lease = await client.lease("a", ResourceShape(gpus=8))
    assert lease.state == "infeasible"
    assert "wanted 1 CPU, 8 GPU" in lease.text


@pytest.mark.parametrize(
    ("selector", "value", "matches"),
    [
        ("a", "a", True),
        ("a", "b", False),
        ("a", None, False),
        ("!a", "b", True),
        ("!a", None, True),
        ("in(a, b)", "b", True),
        ("in(a,b)", "c", False),
        ("!in(a,b)", "c", True),
    ],
)
async def test_label_selectors(selector: str, value: str | None, matches: bool) -> None:
    labels = {} if value is None else {"zone": value}
    assert fits(ResourceShape(labels={"zone": selector}), {"CPU": 1}, labels) is matches


async def test_shapes() -> None:
    shape = ResourceShape(cpus=0.5, gpus=1, memory=1000, custom={"tpu": 2})
    assert shape.amounts == {"CPU": 0.5, "GPU": 1, "memory": 1000, "tpu": 2}
    assert lacking(shape, {"CPU": 4, "GPU": 0.5, "memory": 1000}) == {"GPU", "tpu"}
    assert shape.identity == ResourceShape.model_validate_json(shape.model_dump_json()).identity
    dead = {"Alive": False, "Resources": {"CPU": 64}, "Labels": {}}
    assert "there is no node" in why_infeasible(ResourceShape(), [dead])


async def test_memory_is_told_in_gigabytes() -> None:
    node = {"Alive": True, "NodeManagerHostname": "n", "Resources": {"CPU": 2.0, "memory": 16_954_000_000.0}}
    reason = why_infeasible(ResourceShape(memory=900_000_000_000), [node])
    assert "wanted 1 CPU, 900 GB memory, there is `n` with 2 CPU, 0 GPU, 16.954 GB memory" in reason
