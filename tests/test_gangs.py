"""Gangs on two real Ray nodes: who they are, how they end, and that no placement group is left."""

import asyncio
import json
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from cluster.dispatch import RayDispatch, RayHandle, RayLocation
from cluster.room import Room
from cluster.shape import ResourceShape, why_infeasible
from steps import Gang, Progress, StepRequest, StepResult
from steps._files import attempt_dir

pytestmark = [pytest.mark.ray, pytest.mark.asyncio(loop_scope="module")]

WORK = '''
import os, socket, time

def connected(address):
    """Rank 0 may come later."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection(address, timeout=30)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)

def meet(context):
    """Rank 0 adds up what the others send to the address that all of them know."""
    gang = context.gang
    print(f"rank {gang.rank} of {gang.size}", flush=True)
    if gang.rank:
        with connected((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))) as peer:
            peer.sendall(str(gang.rank).encode())
        return {"rank": gang.rank}
    with socket.create_server((gang.master_address, gang.master_port)) as server:
        server.settimeout(30)
        total = sum(int(server.accept()[0].recv(64)) for _ in range(gang.size - 1))
    return {"rank": 0, "total": total, "gpus": os.environ["CUDA_VISIBLE_DEVICES"]}
'''


class Bench:
    """A dispatch on the two nodes."""

    def __init__(self, head: Any, folder: Path) -> None:
        self.head = head
        self.folder = folder
        self.run_id = uuid.uuid4().hex[:8]
        (folder / "work.py").write_text(WORK)
        self.dispatch = self.new_dispatch()

    def new_dispatch(self) -> RayDispatch:
        async def locate() -> RayLocation:
            return RayLocation(address=self.head.address, token_file=str(self.head.token_file))

        return RayDispatch(locate, driver_log=self.folder / "driver.log", idle_ttl_s=3.0)

    def request(self, type: str, params: dict[str, Any], **fields: Any) -> StepRequest:
        names = {"workflow_id": "flow", "run_id": self.run_id, "step_id": uuid.uuid4().hex[:8], "step_name": "step"}
        paths = {"plan_dir": str(self.folder), "working_dir": str(self.folder), "log_dir": str(self.folder / "logs")}
        known: dict[str, Any] = {**names, **paths, "attempt": 1, "timeout_s": 60, "grace_s": 0.5}
        return StepRequest(type=type, params=params, **{**known, **fields})

    def shell(self, script: str, **fields: Any) -> StepRequest:
        return self.request("command", {"command": "sh", "args": ["-c", script]}, **fields)

    async def start(self, request: StepRequest, **shape: Any) -> RayHandle:
        return await self.dispatch.attach_or_start(request, ResourceShape(**{"nodes": 2, **shape}))

    async def run(self, request: StepRequest, **shape: Any) -> StepResult:
        handle = await self.start(request, **shape)
        return await asyncio.wait_for(handle.wait(), 120)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(ray_pair: Any, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    bench = Bench(ray_pair, tmp_path_factory.mktemp("gangs"))
    yield bench
    await bench.dispatch.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ray(ray_pair: Any) -> AsyncIterator[Any]:
    from cluster.connect import connect

    await connect(ray_pair.address, ray_pair.token_file)
    import ray

    yield ray
    ray.shutdown()


async def until(handle: RayHandle, wanted: Callable[[Progress], object]) -> Progress:
    """The first progress for which `wanted` is true."""
    found: asyncio.Future[Progress] = asyncio.get_running_loop().create_future()

    def listen(progress: Progress) -> None:
        if wanted(progress) and not found.done():
            found.set_result(progress)

    waiting = asyncio.ensure_future(handle.wait(listen))
    await asyncio.wait({found, waiting}, timeout=120, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    assert found.done(), f"got {handle.progress} and {handle.result}"
    return found.result()


async def holds(what: Callable[[], object], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def no_group_is_left(ray: Any) -> None:
    from ray.util import placement_group_table

    await holds(lambda: all(group["state"] == "REMOVED" for group in placement_group_table().values()))


def logs(request: StepRequest) -> list[str]:
    folder = attempt_dir(request)
    paths = [path / "stdout.log" for path in (folder, folder / "rank-1")]
    return [path.read_text() if path.exists() else "" for path in paths]


def sleepers(request: StepRequest) -> list[int]:
    """Pids that both members have written to their logs."""
    return [int(text) for text in logs(request) if text.strip()]


async def test_members_meet_and_rank_0_speaks_for_them(bench: Bench, ray: Any) -> None:
    request = bench.request("python", {"call": "work:meet"}, expected_outputs=("total",))
    result = await bench.run(request, gpus=1)
    assert result.outcome == "succeeded", result
    assert result.outputs == {"rank": 0, "total": 1, "gpus": "0"}
    assert result.gpus == ("0", "0")
    assert logs(request) == ["rank 0 of 2\n", "rank 1 of 2\n"]
    member = json.loads((attempt_dir(request) / "rank-1" / "result.json").read_text())
    assert member["outputs"] == {"rank": 1}
    await no_group_is_left(ray)


async def test_programs_find_torchruns_variables(bench: Bench) -> None:
    request = bench.shell(
        'echo "$RANK/$WORLD_SIZE $NODE_RANK $PET_NNODES $PET_NODE_RANK $PET_NPROC_PER_NODE $MASTER_ADDR"'
    )
    result = await bench.run(request, gpus=2)
    assert result.outcome == "succeeded", result
    words = [text.split() for text in logs(request)]
    assert [word[:5] for word in words] == [["0/2", "0", "2", "0", "2"], ["1/2", "1", "2", "1", "2"]]
    assert words[0][5] == words[1][5]


async def test_one_node_is_a_gang_too(bench: Bench, ray: Any) -> None:
    result = await bench.run(bench.request("python", {"call": "work:meet"}), nodes=1)
    assert result.outputs == {"rank": 0, "total": 0, "gpus": ""}


async def test_a_failing_member_ends_the_others(bench: Bench, ray: Any) -> None:
    request = bench.shell('[ "$RANK" = 1 ] && exit 5; setsid sleep 600 & echo $!; wait')
    result = await bench.run(request)
    assert (result.outcome, result.reason, result.exit_code) == ("failed", "exit_code", 5)
    assert result.error.startswith("rank 1 on ")
    assert not any(psutil.pid_exists(pid) for pid in sleepers(request))
    await no_group_is_left(ray)


async def test_cancel_and_time_limit_end_every_member(bench: Bench, ray: Any) -> None:
    script = "setsid sleep 600 & echo $!; wait"
    request = bench.shell(script)
    handle = await bench.start(request)
    await until(handle, lambda progress: progress.last_line.isdigit())
    await handle.cancel()
    assert (await asyncio.wait_for(handle.wait(), 60)).outcome == "cancelled"
    late = bench.shell(script, timeout_s=2)
    assert (await bench.run(late)).outcome == "timed_out"
    assert not any(psutil.pid_exists(pid) for pid in [*sleepers(request), *sleepers(late)])
    await no_group_is_left(ray)


async def test_a_killed_member_is_a_failure_of_the_infrastructure(bench: Bench, ray: Any) -> None:
    request = bench.shell("echo $PPID; exec sleep 600")
    handle = await bench.start(request)
    await until(handle, lambda progress: progress.last_line.isdigit())
    await holds(lambda: len(sleepers(request)) == 2)
    os.kill(sleepers(request)[1], signal.SIGKILL)
    result = await asyncio.wait_for(handle.wait(), 120)
    assert (result.outcome, result.reason, result.final) == ("failed", "infrastructure", False)
    assert result.error.startswith("rank 1")
    await no_group_is_left(ray)


async def test_another_driver_and_another_pool_find_a_running_gang(bench: Bench, ray: Any) -> None:
    request = bench.shell(
        'echo begun >> "begun.$RANK"; until [ -e go ]; do sleep 0.1; done; '
        'echo "{\\"rank\\": $RANK}" >> "$STEP_OUTPUTS"'
    )
    handle = await bench.start(request)
    await holds(lambda: all((bench.folder / f"begun.{rank}").exists() for rank in (0, 1)))
    for process in bench.head.processes("ray::Pool"):
        process.kill()
    await bench.dispatch.close()
    assert not handle.result.done()
    bench.dispatch = bench.new_dispatch()
    again = await bench.start(request)
    await until(again, lambda progress: progress.pid)
    (bench.folder / "go").touch()
    result = await asyncio.wait_for(again.wait(), 120)
    assert (result.outcome, result.outputs) == ("succeeded", {"rank": 0})
    assert [(bench.folder / f"begun.{rank}").read_text() for rank in (0, 1)] == ["begun\n"] * 2
    await no_group_is_left(ray)


async def test_a_gang_waits_for_all_its_nodes_and_says_so(bench: Bench, ray: Any) -> None:
    holder = await bench.start(bench.shell("sleep 600"), nodes=0, gpus=2)
    await until(holder, lambda progress: progress.pid)
    gang = await bench.start(bench.shell("true"), gpus=2)
    progress = await until(gang, lambda progress: "1 of 2 nodes have that free" in progress.text)
    assert "waiting for 2 nodes, each with 1 CPU, 2 GPU (" in progress.text
    await holder.cancel()
    assert (await asyncio.wait_for(gang.wait(), 120)).outcome == "succeeded"
    await no_group_is_left(ray)


async def test_a_cancelled_gang_that_waits_leaves_no_group(bench: Bench, ray: Any) -> None:
    holder = await bench.start(bench.shell("sleep 600"), nodes=0, gpus=2)
    await until(holder, lambda progress: progress.pid)
    gang = await bench.start(bench.shell("true"), gpus=2)
    await until(gang, lambda progress: "waiting for" in progress.text)
    await gang.cancel()
    assert (await asyncio.wait_for(gang.wait(), 60)).outcome == "cancelled"
    await holder.cancel()
    await no_group_is_left(ray)


@pytest.mark.parametrize("shape", [{"nodes": 3}, {"gpus": 3}, {"labels": {"files": "own"}}])
async def test_a_gang_that_cannot_be_had_fails_at_once(bench: Bench, shape: dict[str, Any]) -> None:
    result = await bench.run(bench.shell("true"), **shape)
    assert (result.outcome, result.reason, result.final) == ("failed", "infeasible", True)
    assert "nodes, each with 1 CPU" in result.error and "there is" in result.error


async def test_parts_of_a_gpu_are_shared_and_told(bench: Bench) -> None:
    folder = bench.folder / "sharing"
    folder.mkdir()
    wait = f"touch {folder}/$STEP_ID; while [ $(ls {folder} | wc -l) -lt 4 ]; do sleep 0.05; done"
    requests = [bench.shell(f'{wait}; echo "$CUDA_VISIBLE_DEVICES"') for _ in range(4)]
    labels = {"zone": "here"}
    results = await asyncio.gather(*(bench.run(one, nodes=0, cpus=0.1, gpus=0.5, labels=labels) for one in requests))
    assert {result.outcome for result in results} == {"succeeded"}
    assert sorted(result.gpus for result in results) == [("0",), ("0",), ("1",), ("1",)]
    for request, result in zip(requests, results, strict=True):
        assert (attempt_dir(request) / "stdout.log").read_text() == f"{result.gpus[0]}\n"
    none = bench.shell('echo "<$CUDA_VISIBLE_DEVICES>"')
    assert (await bench.run(none, nodes=0)).gpus == ()
    assert (attempt_dir(none) / "stdout.log").read_text() == "<>\n"


def node(number: int, cpus: float, **labels: str) -> dict[str, Any]:
    return {"NodeID": f"n{number}", "Alive": True, "Resources": {"CPU": cpus}, "Labels": labels}


async def test_room_is_reckoned_node_by_node() -> None:
    nodes = [node(1, 4), node(2, 4, zone="far"), node(3, 1)]
    room = Room(nodes, {"n1": {"CPU": 1}, "n2": {"CPU": 4}, "n3": {"CPU": 1}})
    assert room.fits(ResourceShape(cpus=4)) and not room.fits(ResourceShape(cpus=4, nodes=2))
    assert room.lacking(ResourceShape(cpus=4, nodes=2)) == {"CPU"}
    assert room.lacking(ResourceShape(cpus=2, labels={"zone": "!far"})) == {"CPU"}
    assert not room.without([ResourceShape(cpus=3)]).fits(ResourceShape(cpus=2))
    room.give(ResourceShape(cpus=3), ["n1"])
    assert room.fits(ResourceShape(cpus=4, nodes=2))
    assert "2 of the 3 nodes the step asks for" in why_infeasible(ResourceShape(cpus=4, nodes=3), nodes)


async def test_a_gang_of_none_has_no_variables() -> None:
    assert Gang().environment == {}
    assert Gang(master_address="a", master_port=1).environment["WORLD_SIZE"] == "1"
    with pytest.raises(ValueError, match="part of one or whole ones"):
        ResourceShape(gpus=1.5)
