"""Calls to Ray actors and nodes with a time limit, and handles kept by name, for the driver's side of an attempt."""

import asyncio
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import LocalRayletDiedError, NodeDiedError, RaySystemError, RpcError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.connect import NAMESPACE, ClusterError
from cluster.pool import open_pool

_actors: dict[str, Any] = {}
_pools: dict[str, Any] = {}


class ActorGone(Exception):
    """The actor of the attempt is dead; the argument says how."""


async def pool_handle(name: str, idle_ttl_s: float) -> Any:
    """Handle of the pool of that name; it is started when there is none."""
    if name not in _pools:
        _pools[name] = await asyncio.to_thread(open_pool, name, idle_ttl_s)
    return _pools[name]


def forget_pool(name: str) -> None:
    """Look the pool up anew next time."""
    _pools.pop(name, None)


async def actor_handle(name: str) -> Any:
    """Handle of a step actor. Raises `ActorGone` when there is none of that name."""
    if name not in _actors:
        try:
            _actors[name] = await asyncio.to_thread(ray.get_actor, name, NAMESPACE)
        except ValueError as error:
            raise ActorGone(f"there is no actor `{name}`") from error
    return _actors[name]


def release(actor: str, key: str) -> None:
    """Tell a step actor that nobody needs the attempt any more; nobody waits for the answer."""
    if actor in _actors:
        _actors[actor].release.remote(key)


async def kill(actor: str) -> None:
    """Kill a step actor's process."""
    handle = _actors.pop(actor, None)
    if handle is not None:
        await asyncio.to_thread(ray.kill, handle, no_restart=True)
        await asyncio.sleep(0.5)


async def call(ref: Any, timeout_s: float) -> Any:
    """Await a Ray call. Raises `TimeoutError`, Ray's errors, and `ClusterError` when the cluster is lost."""
    try:
        return await asyncio.wait_for(ref.as_future(), timeout_s)
    except (LocalRayletDiedError, RaySystemError, RpcError) as error:
        raise ClusterError(f"the Ray cluster does not answer: {first_line(error)}") from error


def on_node(function: Callable[..., Any], node_id: str, *arguments: Any) -> Any:
    """Run a function on one node, without asking it for resources."""
    affinity = NodeAffinitySchedulingStrategy(node_id, soft=False)
    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    return remote.options(scheduling_strategy=affinity).remote(*arguments)


async def check_alive(node_id: str) -> None:
    """Raises `NodeDiedError` when the node is dead."""
    nodes = await asyncio.to_thread(ray.nodes)
    if not any(node["Alive"] and node["NodeID"] == node_id for node in nodes):
        raise NodeDiedError("it is dead")


def first_line(error: BaseException) -> str:
    """What an error says, without its traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
