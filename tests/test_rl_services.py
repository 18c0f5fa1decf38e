"""Services: the pool by itself, then the same script over Monarch and over Ray."""

import asyncio
import os
import subprocess
import sys
from typing import Any

import pytest

from rl.services import NoReplica, ReplicaLost, ReplicaPool, ServiceSettings
from rl.virtual_clock import run_virtually


class Scripted:
    """A replica of a scripted host."""

    def __init__(self, name: str, host: "ScriptedHost") -> None:
        self.name = name
        self.host = host

    async def call(self, method: str, *arguments: Any) -> Any:
        if self.name in self.host.silent:
            await asyncio.sleep(1000)
        if self.name in self.host.gone:
            raise ReplicaLost(self.name)
        if method == "ready":
            await asyncio.sleep(self.host.ready_s)
            if self.host.failures:
                self.host.failures -= 1
                raise RuntimeError("does not start")
        return self.name


class ScriptedHost:
    """Starts replicas that are ready after a while, or that fail to start."""

    def __init__(self) -> None:
        self.ready_s = 1.0
        self.failures = 0
        self.silent: set[str] = set()
        self.gone: set[str] = set()
        self.started: list[float] = []
        self.stopped: list[str] = []

    async def start(self, name: str) -> Scripted:
        self.started.append(asyncio.get_running_loop().time())
        return Scripted(name, self)

    async def stop(self, replica: Any) -> None:
        self.stopped.append(replica.name)


def pool_of(host: ScriptedHost, **settings: Any) -> ReplicaPool:
    return ReplicaPool("echo", host, ServiceSettings(**settings))


def test_the_least_loaded_replica_is_chosen_and_equals_in_turn() -> None:
    async def script() -> None:
        pool = pool_of(ScriptedHost(), num_replicas=3)
        await pool.open()
        first = [await pool.get_replica() for _ in range(3)]
        assert [index for _, index in first] == [0, 1, 2]
        pool.release(*first[1])
        assert (await pool.get_replica())[1] == 1
        assert pool.health().num_calls == (1, 1, 1)
        pool.mark_unhealthy(0)
        assert {(await pool.get_replica())[1] for _ in range(2)} == {1, 2}
        await pool.mark_healthy(0)
        assert (await pool.get_replica())[1] == 0
        await pool.close()

    run_virtually(script())


def test_a_spare_takes_the_place_at_once_and_has_a_successor() -> None:
    async def script() -> None:
        host = ScriptedHost()
        pool = pool_of(host, num_replicas=2, num_spares=1)
        await pool.open()
        await asyncio.sleep(2)
        assert pool.health().num_spares == 1
        clock = asyncio.get_running_loop().time
        now = clock()
        assert pool.lost("echo_1")
        assert not pool.lost("echo_1")
        assert (await pool.replica_at(0)).name == "echo_3"
        assert clock() == now
        await asyncio.sleep(2)
        assert pool.health().num_spares == 1
        assert pool.lost("echo_4")
        await asyncio.sleep(2)
        assert pool.health().num_spares == 1
        assert set(host.stopped) == {"echo_1", "echo_4"}
        await pool.close()
        assert len(host.stopped) == len(host.started)
        assert not pool.lost("echo_2")

    run_virtually(script())


def test_a_place_that_does_not_hold_is_filled_ever_more_slowly() -> None:
    async def script() -> None:
        host = ScriptedHost()
        host.ready_s = 0.0
        pool = pool_of(host, backoff_s=1.0, longest_backoff_s=4.0)
        await pool.open()
        host.started.clear()
        host.failures = 5
        pool.lost("echo_1")
        with pytest.raises(NoReplica, match="replica 0 of `echo` is not healthy, for 3 s"):
            await pool.replica_at(0, timeout_s=3.0)
        with pytest.raises(NoReplica, match="no replica of `echo` is healthy"):
            await pool.get_replica(timeout_s=1.0)
        await pool.replica_at(0)
        waits = [round(later - before, 6) for before, later in zip(host.started, host.started[1:], strict=False)]
        assert waits == [1.0, 2.0, 4.0, 4.0, 4.0]
        await asyncio.sleep(100)
        host.started.clear()
        now = asyncio.get_running_loop().time()
        pool.lost((await pool.replica_at(0)).name)
        await pool.replica_at(0)
        assert host.started == [now]
        await pool.close()

    run_virtually(script())


def test_those_that_do_not_answer_are_replaced_and_those_that_do_are_healthy_again() -> None:
    async def script() -> None:
        host = ScriptedHost()
        pool = pool_of(host, num_replicas=3)
        await pool.open()
        host.silent.add("echo_1")
        host.gone.add("echo_2")
        pool.mark_unhealthy(2)
        health = await pool.check_health()
        assert (health.healthy, health.unhealthy) == ((1, 2), (0,))
        names = {(await pool.replica_at(index)).name for index in (0, 1)}
        assert names == {"echo_4", "echo_5"}
        assert pool.health().num_respawns == 2
        await pool.close()

    run_virtually(script())


def test_a_service_that_does_not_start_says_why() -> None:
    async def script() -> None:
        host = ScriptedHost()
        host.failures = 1
        with pytest.raises(RuntimeError, match="does not start"):
            await pool_of(host).open()
        assert host.stopped == ["echo_1"]

    run_virtually(script())


SCRIPT = """
import asyncio, faulthandler, os, signal, sys, time
from functools import partial
from importlib import import_module
from rl.services import NoReplica, ReplicaLost, ServiceSettings
services = import_module(f"rl.services_{sys.argv[1]}")

class Echo:
    def __init__(self, word, framework):
        self.word, self.framework = word, framework
        self.began, self.cancelled = asyncio.Event(), asyncio.Event()
    async def ready(self):
        assert os.environ["OF_THE_SERVICE"] == "yes" and "torch" not in sys.modules
    async def pid(self):
        return os.getpid()
    async def slow(self):
        self.began.set()
        try:
            await asyncio.sleep(600)
        finally:
            self.cancelled.set()
    async def has_begun(self):
        await self.began.wait()
        return True
    async def was_cancelled(self):
        await self.cancelled.wait()
        return True
    async def find(self):
        found = import_module(f"rl.services_{self.framework}")
        return await (await found.get_service("echo")).call("word_of"), await found.list_services()
    async def word_of(self):
        return self.word
    async def size(self):
        raise LookupError("no such word")

async def main():
    worker = partial(Echo, "hello", sys.argv[1])
    settings = ServiceSettings(num_replicas=2, num_spares=1, environment={"OF_THE_SERVICE": "yes"})
    async with services.open_service("echo", worker, settings) as echo:
        pids = [await echo.call("pid") for _ in range(4)]
        assert pids[:2] == pids[2:] and len(set(pids)) == 2, pids
        assert await echo.call("find") == ("hello", ["echo"])
        for name, kind in (("size", LookupError), ("nothing", AttributeError)):
            try:
                await echo.call(name)
                raise AssertionError
            except kind:
                pass
        try:
            await services.get_service("other")
            raise AssertionError
        except KeyError as error:
            assert "`other`, but echo" in str(error)

        replica = await echo.replica_at(0)
        slow = asyncio.create_task(replica.call("slow"))
        assert await replica.call("has_begun")
        slow.cancel()
        assert await replica.call("was_cancelled")

        slow = asyncio.create_task(replica.call("slow"))
        pid = await replica.call("pid")
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        try:
            await slow
            raise AssertionError
        except ReplicaLost:
            print("found after", time.monotonic() - killed, file=sys.stderr)
        await echo.replace(replica)
        another = await echo.replica_at(0)
        assert await another.call("pid") not in pids
        assert await echo.call("word_of") == "hello"

        stopped = await echo.replica_at(1)
        stopped_pid = await stopped.call("pid")
        await echo.replace(stopped)
        assert (await echo.replica_at(1)).name != stopped.name
        health = await echo.check_health()
        assert health.healthy == (0, 1) and health.num_respawns == 2, health
        last = await (await echo.replica_at(1)).call("pid")
    assert await services.list_services() == []
    end = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in (*pids, last)):
        assert time.monotonic() < end, "processes are left"
        await asyncio.sleep(0.05)
    print("done", flush=True)

async def connected():
    if sys.argv[1] == "ray":
        import ray
        ray.init(sys.argv[2], namespace="services", log_to_driver=False, logging_level="error",
                 runtime_env={"env_vars": {"PYTHONPATH": sys.argv[3]}})
    # So that the trace of one that hangs says where.
    async with asyncio.timeout(120):
        await main()

faulthandler.dump_traceback_later(150)
asyncio.run(connected())
"""


def _run(*arguments: str, **environment: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=180,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stdout


def test_a_service_over_monarch_replaces_what_dies() -> None:
    assert _run("monarch").endswith("done\n")


@pytest.mark.ray
def test_a_service_over_ray_replaces_what_dies(ray_head: Any) -> None:
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(ray_head.token_file)}
    assert _run("ray", ray_head.address, os.pathsep.join(sys.path), **environment).endswith("done\n")
