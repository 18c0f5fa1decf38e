"""A plan's folder goes to a node that does not share it, and promised files come back: a real second node."""

import asyncio
import hashlib
import os
import subprocess
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from cluster.dispatch import RayDispatch, RayLocation
from cluster.moved import moved
from cluster.package import LIMIT_VARIABLE, PackageError, Packer
from cluster.plan_copies import PlanCopies, remove_unused
from cluster.shape import ResourceShape
from cluster.witness import is_here, look_at
from steps import StepRequest, StepResult
from steps._files import attempt_dir

AWAY = ResourceShape(cpus=0.5, labels={"files": "own"})

WORK = '''
import hashlib, os
from pathlib import Path

loads = []

def make(data, megabytes):
    """Reads a file that came along, makes two that go back."""
    loads.append(1)
    text = Path(data).read_text()
    Path("made").mkdir(exist_ok=True)
    block = hashlib.sha256(text.encode()).digest() * 32768
    with open("made/large.bin", "wb") as file:
        for _ in range(megabytes):
            file.write(block)
    Path("made/tool.sh").write_text("#!/bin/sh\\necho made")
    Path("made/tool.sh").chmod(0o755)
    Path("left").write_text("not promised")
    return {"text": text, "loads": len(loads), "pid": os.getpid(), "path": str(Path("made/large.bin").absolute())}
'''


class Bench:
    """A dispatch on two nodes, one of which has no file of `folder`."""

    def __init__(self, head: Any, folder: Path) -> None:
        self.head = head
        self.folder = folder
        self.run_id = uuid.uuid4().hex[:8]
        folder.mkdir()
        (folder / "work.py").write_text(WORK)
        self.dispatch = self.new_dispatch()

    def new_dispatch(self) -> RayDispatch:
        async def locate() -> RayLocation:
            return RayLocation(address=self.head.address, token_file=str(self.head.token_file))

        return RayDispatch(locate, driver_log=self.head.folder / "driver.log", idle_ttl_s=8.0)

    def request(self, type: str, params: dict[str, Any], **fields: Any) -> StepRequest:
        names = {"workflow_id": "flow", "run_id": self.run_id, "step_id": uuid.uuid4().hex[:8], "step_name": "step"}
        paths = {"plan_dir": str(self.folder), "working_dir": str(self.folder), "log_dir": str(self.folder / "logs")}
        known: dict[str, Any] = {**names, **paths, "attempt": 1, "timeout_s": 60, "grace_s": 0.5}
        return StepRequest(type=type, params=params, **{**known, **fields})

    def make(self, megabytes: int = 1, **fields: Any) -> StepRequest:
        arguments = {"data": str(self.folder / "data.txt"), "megabytes": megabytes}
        return self.request("python", {"call": "work:make", "arguments": arguments}, **fields)

    def shell(self, script: str, **fields: Any) -> StepRequest:
        return self.request("command", {"command": "sh", "args": ["-c", script]}, **fields)

    async def run(self, request: StepRequest, shape: ResourceShape = AWAY) -> StepResult:
        handle = await self.dispatch.attach_or_start(request, shape)
        return await asyncio.wait_for(handle.wait(), 120)

    def copies(self) -> list[str]:
        """Content hashes of the copies on the other node, whose file system is seen through one of its processes."""
        raylets = [process for process in self.head.processes("raylet/raylet") if "127.0.0.3" in str(process.cmdline())]
        folder = Path(
            f"/proc/{raylets[0].pid}/root{self.head.folder}/hidden/tmp/orchestrate-steps-{os.getuid()}/copies"
        )
        return [path.name for path in folder.glob("*") if path.is_dir()]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(ray_pair: Any) -> AsyncIterator[Bench]:
    bench = Bench(ray_pair, ray_pair.folder / "hidden" / "plan")
    (bench.folder / "data.txt").write_text("some data")
    yield bench
    await bench.dispatch.close()


@pytest.mark.ray
@pytest.mark.asyncio(loop_scope="module")
async def test_a_folder_goes_there_once_and_what_was_promised_comes_back(bench: Bench) -> None:
    request = bench.make(megabytes=9, artifacts=("made/large.bin", "made/*.sh"), cached_artifacts=("nothing",))
    result = await bench.run(request)
    assert result.outcome == "succeeded", result
    large = bench.folder / "made" / "large.bin"
    assert result.outputs["text"] == "some data" and result.outputs["path"] == str(large)
    data = large.read_bytes()
    assert len(data) == 9 << 20
    assert result.artifacts["made/large.bin"] == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert set(result.artifacts) == {"made/large.bin", "made/tool.sh"}
    assert os.access(bench.folder / "made" / "tool.sh", os.X_OK)
    assert not (bench.folder / "left").exists()
    large.unlink()
    (bench.folder / "made" / "tool.sh").unlink()
    (bench.folder / "made").rmdir()
    # The folder is as it was before: the same copy, whose module is still loaded in the same actor.
    again = await bench.run(bench.make())
    assert (again.outputs["pid"], again.outputs["loads"]) == (result.pid, 2)
    assert len(bench.copies()) == 1
    deadline = time.monotonic() + 60
    while bench.copies():
        assert time.monotonic() < deadline, "copies outlive the actors that work with them"
        await asyncio.sleep(0.2)


@pytest.mark.ray
@pytest.mark.asyncio(loop_scope="module")
async def test_many_steps_at_a_time_share_a_copy_and_the_shared_node_needs_none(bench: Bench) -> None:
    away = [bench.shell("cat data.txt; pwd >&2") for _ in range(4)]
    here = bench.shell("cat data.txt; pwd >&2; echo > made-here", artifacts=("made-here",))
    elsewhere = ResourceShape(labels={"zone": "here"})
    results = await asyncio.gather(*(bench.run(one) for one in away))
    results.append(await bench.run(here, elsewhere))
    assert {result.outcome for result in results} == {"succeeded"}
    assert {(attempt_dir(one) / "stdout.log").read_text() for one in [*away, here]} == {"some data"}
    assert (attempt_dir(here) / "stderr.log").read_text() == f"{bench.folder}\n"
    (copy,) = {(attempt_dir(one) / "stderr.log").read_text() for one in away}
    assert "/tmp/orchestrate-steps-" in copy
    (bench.folder / "made-here").unlink()


@pytest.mark.ray
@pytest.mark.asyncio(loop_scope="module")
async def test_another_driver_brings_the_artifacts_of_a_step_that_ended_meanwhile(bench: Bench) -> None:
    script = "while [ -e /proc/$WATCHED ]; do sleep 0.05; done"
    watched = subprocess.Popen(["sleep", "600"])
    request = bench.shell(f"{script}; echo late > late", env={"WATCHED": str(watched.pid)}, artifacts=("late",))
    handle = await bench.dispatch.attach_or_start(request, AWAY)
    while not handle.progress.pid:
        waiting = asyncio.ensure_future(handle.wait())
        await asyncio.wait({waiting}, timeout=0.05)
        waiting.cancel()
    await bench.dispatch.close()
    watched.kill()
    watched.wait()
    bench.dispatch = bench.new_dispatch()
    result = await bench.run(request)
    assert (result.outcome, list(result.artifacts)) == ("succeeded", ["late"])
    assert (bench.folder / "late").read_text() == "late\n"
    (bench.folder / "late").unlink()


@pytest.mark.ray
@pytest.mark.asyncio(loop_scope="module")
async def test_a_promise_not_kept_is_a_failure(bench: Bench) -> None:
    result = await bench.run(bench.shell("true", artifacts=("missing.bin",)))
    assert (result.outcome, result.error) == ("failed", "the step did not make its declared artifact `missing.bin`")
    outside = bench.shell("echo > /tmp/outside-$STEP_ID", artifacts=("/etc/hostname",))
    result = await bench.run(outside)
    assert (result.outcome, result.reason, result.final) == ("failed", "artifacts", True)
    assert "lies outside of the plan's folder" in result.error


@pytest.mark.ray
@pytest.mark.asyncio(loop_scope="module")
async def test_a_gang_over_both_kinds_of_node(bench: Bench) -> None:
    request = bench.shell('cat data.txt; echo "$RANK" > "rank.$RANK"; pwd', artifacts=("rank.0",))
    result = await bench.run(request, ResourceShape(nodes=2))
    assert result.outcome == "succeeded", result
    assert (bench.folder / "rank.0").read_text() == "0\n"
    assert set(result.artifacts) == {"rank.0"}


@pytest.mark.ray
@pytest.mark.asyncio(loop_scope="module")
async def test_a_folder_that_is_too_large_is_refused_with_a_hint(
    ray_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "1MB")
    bench = Bench(ray_pair, ray_pair.folder / "hidden" / "large")
    (bench.folder / "weights.bin").write_bytes(b"w" * 2_000_000)
    result = await bench.run(bench.shell("true"))
    assert (result.outcome, result.reason, result.final) == ("failed", "files", True)
    assert "`weights.bin` (2.0 MB)" in result.error and "hint: name what steps do not need in" in result.error
    (bench.folder / ".orchestrateignore").write_text("*.bin\n")
    assert (await bench.run(bench.shell("! test -e weights.bin"))).outcome == "succeeded"
    await bench.dispatch.close()


@pytest.fixture
def plan(tmp_path: Path, step_request: Any) -> StepRequest:
    folder = tmp_path / "plan"
    folder.mkdir()
    request: StepRequest = step_request(plan_dir=str(folder), log_dir=str(folder / "logs"), inputs=("data/needed.bin",))
    return request


def unpacked(request: StepRequest, root: Path) -> Path:
    """The folder after its way through a package and a node's copies."""
    package, copies = Packer().pack(request), PlanCopies(root)
    for offset in range(0, package.size, 7777):
        copies.receive(offset, package.read(offset, 7777))
    copies.unpack(package.hash)
    found = copies.hold(package.hash)
    assert found is not None
    return found


def test_what_goes_along(plan: StepRequest, tmp_path: Path) -> None:
    folder = Path(plan.plan_dir)
    for name in (
        "a.py",
        "data/needed.bin",
        "data/other.bin",
        "logs/x.log",
        ".git/config",
        "venv/pyvenv.cfg",
        "d/x.pyc",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    (tmp_path / "outside").write_text("outside")
    (folder / "link").symlink_to("d")
    (folder / "out").symlink_to(tmp_path / "outside")
    (folder / "a.py").chmod(0o755)
    (folder / ".gitignore").write_text("data/\n")
    found = unpacked(plan, tmp_path)
    names = {str(path.relative_to(found)) for path in found.rglob("*")}
    assert names == {"a.py", "data", "data/needed.bin", "d", "link", "out", ".gitignore"}
    assert (found / "link").is_symlink() and (found / "out").read_text() == "outside"
    assert os.access(found / "a.py", os.X_OK)


def test_the_hash_is_of_the_content_alone(plan: StepRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(plan.plan_dir) / "a.py"
    file.write_text("1")
    packer = Packer()
    first = packer.pack(plan)
    os.utime(file, (1, 1))
    second = packer.pack(plan)
    assert second.hash == first.hash
    assert packer.pack(plan) is second
    file.chmod(0o755)
    assert packer.pack(plan).hash != first.hash
    with monkeypatch.context() as patch, pytest.raises(PackageError, match="wanted bytes or a text like"):
        patch.setenv(LIMIT_VARIABLE, "much")
        packer.pack(plan)
    with pytest.raises(PackageError, match="leads out of it"):
        (file.parent / "link").symlink_to("/etc")
        packer.pack(plan)


def test_a_copy_stays_while_somebody_works_with_it(plan: StepRequest, tmp_path: Path) -> None:
    (Path(plan.plan_dir) / "a.py").write_text("1")
    found = unpacked(plan, tmp_path)
    other = PlanCopies(tmp_path)
    assert other.hold(found.name) == found
    remove_unused(tmp_path)
    assert found.is_dir()
    del other
    package = Packer().pack(plan)
    copies = PlanCopies(tmp_path)
    copies.receive(0, package.read(0, package.size))
    with pytest.raises(ValueError, match="wanted ffff"):
        copies.unpack("ffff")
    assert not list(found.parent.glob(".*"))


def test_a_folder_of_the_same_name_is_not_the_same(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("1")
    witness = look_at(tmp_path / "a")
    assert witness is not None and is_here(witness, tmp_path / "a")
    assert not is_here(witness, tmp_path) and not is_here(witness, tmp_path / "none")
    assert look_at(tmp_path / "none") is None
    far = witness.model_copy(update={"boot_id": "another machine's", "device": 1})
    assert is_here(far, tmp_path / "a"), "a network file system has the same inodes and times everywhere"
    (tmp_path / "a" / "file").write_text("22")
    assert not is_here(far, tmp_path / "a"), "a copy has others"


words = st.text("ab/._- ", max_size=8)


@given(before=words, after=words)
def test_paths_move_and_come_back(before: str, after: str) -> None:
    text = f"{before} /old/plan/{after} /older /x/old/plan /old/plan2 /old/plan"
    there = moved({"a": [text, 3]}, "/old/plan", "/new")
    assert "/old/plan/" not in there["a"][0] and there["a"][0].endswith("/older /x/old/plan /old/plan2 /new")
    assert moved(there, "/new", "/old/plan") == {"a": [text, 3]}
