"""Steps whose Ray actor runs in an image: what it sees, what is refused, and what is left when it ends."""

import asyncio
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from cluster.call import RayCall
from cluster.checks import LOGICAL_GPUS_VARIABLE, check_image
from cluster.dispatch import RayDispatch, RayHandle, RayLocation
from cluster.shape import ResourceShape
from container import reaper
from container.image_label import image_label
from container.kit import ensure_kit, kits_root
from container.worker import ACTOR_LABEL
from steps import Progress, StepRequest, StepResult
from steps._files import attempt_dir
from steps._secrets import run_secrets_dir

pytestmark = [pytest.mark.ray, pytest.mark.asyncio(loop_scope="module")]

WORK = """
import os, sys

calls = []

def look():
    calls.append(1)
    limits = {}
    for name, paths in {"memory": ("memory/memory.limit_in_bytes", "memory.max"),
                        "cpus": ("cpu/cpu.cfs_quota_us", "cpu.max")}.items():
        for path in paths:
            if os.path.exists(f"/sys/fs/cgroup/{path}"):
                limits[name] = open(f"/sys/fs/cgroup/{path}").read().split()[0]
    print("looked around", file=sys.stderr)
    return {"inside": os.path.exists("/.dockerenv"), "user": [os.getuid(), os.getgid()], "limits": limits,
            "calls": len(calls), "pid": os.getpid(), "folder": os.getcwd(), "python": sys.executable,
            "home": os.path.expanduser("~"), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
"""


class Bench:
    """A dispatch on one head, for steps in images."""

    def __init__(self, head: Any, folder: Path, image: str, engine: Any) -> None:
        self.head = head
        self.folder = folder
        self.image = image
        self.engine = engine
        self.run_id = uuid.uuid4().hex[:8]
        (folder / "work.py").write_text(WORK)
        self.dispatch = RayDispatch(self.locate, driver_log=folder / "driver.log", idle_ttl_s=20.0)

    async def locate(self) -> RayLocation:
        return RayLocation(address=self.head.address, token_file=str(self.head.token_file))

    def request(self, type: str, params: dict[str, Any], **fields: Any) -> StepRequest:
        known: dict[str, Any] = {
            "workflow_id": "flow",
            "run_id": self.run_id,
            "step_id": uuid.uuid4().hex[:8],
            "step_name": "step",
            "attempt": 1,
            "plan_dir": str(self.folder),
            "working_dir": str(self.folder),
            "log_dir": str(self.folder / "logs"),
            "timeout_s": 120,
            "grace_s": 0.5,
        }
        return StepRequest(type=type, params=params, **{**known, **fields})

    def shell(self, script: str, **fields: Any) -> StepRequest:
        return self.request("command", {"command": "sh", "args": ["-c", script]}, **fields)

    def look(self, **fields: Any) -> StepRequest:
        return self.request("python", {"call": "work:look"}, **fields)

    async def start(self, request: StepRequest, **shape: Any) -> RayHandle:
        return await self.dispatch.attach_or_start(request, ResourceShape(**{"image": self.image, **shape}))

    async def run(self, request: StepRequest, **shape: Any) -> StepResult:
        handle = await self.start(request, **shape)
        return await asyncio.wait_for(handle.wait(), 120)

    def containers(self) -> list[Any]:
        """Containers of actors of this head: all that see its folder."""
        found = self.engine.containers.list(all=True, filters={"label": ACTOR_LABEL}, ignore_removed=True)
        return [
            each for each in found if any(str(self.head.folder) in mount["Source"] for mount in each.attrs["Mounts"])
        ]

    def traces(self) -> list[str]:
        """What a container of this head left: itself, its files, its processes."""
        names = [each.name for each in self.containers()]
        return [*names, *(str(path) for path in reaper.private_folder("step-*").parent.glob("orchestrate-private-*"))]


@pytest.fixture(scope="module")
def head(make_ray_head: Callable[[], Any]) -> Iterator[Any]:
    """A head with two GPUs that are numbers only, and a folder for secrets that our driver knows too."""
    head = make_ray_head()
    folders = {
        "SYGALDRY_CONTAINER_ROOT": str(head.folder / "root"),
        "ORCHESTRATE_SECRETS_DIR": str(head.folder / "secrets"),
    }
    head.start("--num-gpus=2", **{LOGICAL_GPUS_VARIABLE: "1", "PRIVATE_OF_THE_HOST": "do not look"}, **folders)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORCHESTRATE_SECRETS_DIR", folders["ORCHESTRATE_SECRETS_DIR"])
        yield head


@pytest.fixture(scope="module")
def image_with(ray_image: str, docker_engine: Any) -> Iterator[Callable[[str], str]]:
    """Makes an image as it is built with a Spack environment of this name."""
    container = docker_engine.containers.create(ray_image, "true")
    names = []

    def make(environment: str) -> str:
        content_hash = uuid.uuid4().hex * 2
        names.append(f"sygaldry-test/with-{environment}:{content_hash[:8]}")
        changes = f"ENV SYGALDRY_SPACK_ENVIRONMENT={environment}\nLABEL sygaldry.content_hash={content_hash}"
        container.commit(*names[-1].split(":"), changes=changes)
        return names[-1]

    yield make
    container.remove()
    for name in names:
        docker_engine.images.remove(name)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(
    head: Any,
    ray_image: str,
    image_with: Callable[[str], str],
    docker_engine: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Bench]:
    # Images are removed after their actors, hence `image_with`.
    bench = Bench(head, tmp_path_factory.mktemp("bench"), ray_image, docker_engine)
    yield bench
    await bench.dispatch.close()
    head.kill()
    assert await until_true(lambda: not bench.traces()), bench.traces()


async def until_true(condition: Callable[[], object], timeout_s: float = 60) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if await asyncio.to_thread(condition):
            return True
        await asyncio.sleep(0.1)
    return False


async def until(handle: RayHandle, wanted: Callable[[Progress], object]) -> Progress:
    """The first progress for which `wanted` is true."""
    found: asyncio.Future[Progress] = asyncio.get_running_loop().create_future()

    def listen(progress: Progress) -> None:
        if wanted(progress) and not found.done():
            found.set_result(progress)

    waiting = asyncio.ensure_future(handle.wait(listen))
    ends: set[asyncio.Future[Any]] = {found, waiting}
    await asyncio.wait(ends, timeout=120, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    assert found.done(), f"got {handle.progress} and {handle.result}"
    return found.result()


async def test_a_step_runs_in_its_image_with_its_limits_and_its_actor_stays_warm(bench: Bench) -> None:
    shape = {"cpus": 0.5, "memory": 500_000_000}
    first, second = [await bench.run(bench.look(), **shape) for _ in range(2)]
    assert first.outcome == second.outcome == "succeeded", (first, second)
    inside = first.outputs
    assert inside["inside"] and inside["user"] == [os.getuid(), os.getgid()]
    assert inside["folder"] == str(bench.folder)
    assert int(inside["limits"]["memory"]) == pytest.approx(shape["memory"], abs=1 << 12)
    assert inside["limits"]["cpus"] == "50000"
    assert (second.outputs["pid"], second.outputs["calls"]) == (inside["pid"], 2)
    assert (Path(first.attempt_dir) / "stderr.log").read_text() == "looked around\n"
    image_id = bench.engine.images.get(bench.image).id
    assert first.image == f"{bench.image}@{image_id}"
    assert first.node == socket.gethostname()


async def test_nothing_of_the_hosts_environment_is_inside_but_secrets_are(bench: Bench) -> None:
    script = 'env; echo "key: $KEY" >&2; test -n "$KEY" && echo "{\\"seen\\": true}" >> $STEP_OUTPUTS'
    request = bench.shell(script, env={"OWN": "yes"}, secrets={"KEY": "STABLE"})
    result = await bench.run(request)
    assert (result.outcome, result.outputs) == ("succeeded", {"seen": True}), result
    lines = (attempt_dir(request) / "stdout.log").read_text()
    assert "OWN=yes" in lines and "PRIVATE_OF_THE_HOST" not in lines and "RAY_AUTH" not in lines
    assert (attempt_dir(request) / "stderr.log").read_text() == "key: ***\n"
    described = json.dumps([each.attrs for each in bench.containers()])
    assert bench.head.secret not in described
    assert bench.head.token_file.read_text() not in described


async def test_a_step_in_an_image_and_a_container_job_have_the_same_caches(
    bench: Bench, run_step: Callable[..., StepResult], small_image: str, tmp_path: Path
) -> None:
    root = {"SYGALDRY_CONTAINER_ROOT": str(tmp_path / "root")}
    made = await bench.run(bench.shell("echo warm > /opt/hf_cache/made", env=root))
    assert made.outcome == "succeeded", made
    look = {"command": "grep warm /opt/hf_cache/made", "image": small_image}
    seen = await asyncio.to_thread(run_step, "container_job", look, env=root)
    assert seen.outcome == "succeeded", seen


async def test_a_container_has_the_secrets_of_its_step_as_they_are_now(bench: Bench) -> None:
    kept = bench.head.folder / "secrets"

    def keep(folder: Path, name: str, value: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".{name}").write_text(value)
        (folder / f".{name}").replace(folder / name)

    async def found(wanted: str, **fields: Any) -> str:
        script = f'test "$TOKEN" = {wanted} && ! ls {kept} && ls -A /run/secrets'
        request = bench.shell(script, secrets={"TOKEN": "KEY"}, **fields)
        result = await bench.run(request)
        assert result.outcome == "succeeded", result
        return (attempt_dir(request) / "stdout.log").read_text()

    keep(kept, "KEY", "first-value")
    keep(kept, "OTHER", "of-another-step")
    keep(run_secrets_dir(kept, "another-flow"), "KEY", "of-another-run")
    assert await found("first-value") == "KEY\n"
    keep(kept, "KEY", "second-value")
    assert await found("second-value") == "KEY\n"
    keep(run_secrets_dir(kept, "flow"), "KEY", "of-this-run")
    assert await found("of-this-run") == "KEY\n"
    assert await found("second-value", workflow_id="third-flow") == "KEY\n"
    without = await bench.run(bench.shell(f"! ls {kept} && ! ls /run/secrets/KEY"))
    assert without.outcome == "succeeded", without


def make_view(store: Path) -> None:
    """The view `standin`, with a program and a Python module."""
    view = store / "views" / "standin"
    packages = view / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "viewmodule.py").write_text("def where():\n    return {'file': __file__}\n")
    (view / "bin").mkdir()
    (view / "bin" / "greet").write_text('#!/bin/sh\necho "hello from $SPACK_ENV_VIEW"\n')
    (view / "bin" / "greet").chmod(0o755)


async def test_a_step_in_an_image_with_an_environment_has_its_view(
    bench: Bench, image_with: Callable[[str], str]
) -> None:
    make_view(bench.head.folder / "root" / "spack_store")
    image, view = image_with("standin"), "/opt/spack_store/views/standin"
    request = bench.request("command", {"command": "greet"})
    greeted = await bench.run(request, image=image)
    assert greeted.outcome == "succeeded", greeted
    assert (attempt_dir(request) / "stdout.log").read_text() == f"hello from {view}\n"
    called = await bench.run(bench.request("python", {"call": "viewmodule:where"}), image=image)
    assert called.outcome == "succeeded" and called.outputs["file"].startswith(f"{view}/lib/"), called
    missing = await bench.run(bench.shell("true"), image=image_with("unbuilt"))
    assert (missing.outcome, missing.reason, missing.final) == ("failed", "image", True)
    assert "there is no `/opt/spack_store/views/unbuilt/bin`" in missing.error
    assert "hint: `orchestrate spack build unbuilt`" in missing.error


async def test_a_node_that_is_an_image_without_its_view_runs_nothing(
    make_ray_head: Callable[[], Any], docker_engine: Any, tmp_path: Path
) -> None:
    head = make_ray_head()
    store = head.folder / "store"
    head.start(
        SYGALDRY_IMAGE_LABEL="sygaldry.standin-0123456789abcdef",
        SYGALDRY_SPACK_ENVIRONMENT="standin",
        SYGALDRY_SPACK_STORE=str(store),
    )
    bench = Bench(head, tmp_path, "", docker_engine)
    try:
        missing = await bench.run(bench.shell("true"))
        assert (missing.outcome, missing.reason, missing.final) == ("failed", "image", True)
        assert missing.error.startswith(f"no actor comes up on `{socket.gethostname()}`: ")
        assert f"there is no `{store}/views/standin/bin`" in missing.error
        make_view(store)
        for request in (bench.shell("greet"), bench.request("python", {"call": "viewmodule:where"})):
            result = await bench.run(request)
            assert result.outcome == "succeeded", result
    finally:
        await bench.dispatch.close()
        head.kill()


async def test_the_gpus_ray_assigned_are_visible_by_their_numbers(bench: Bench) -> None:
    result = await bench.run(bench.look(), gpus=2)
    assert (result.outcome, result.gpus) == ("succeeded", ("0", "1")), result
    assert result.outputs["gpus"] == "0,1"


async def test_any_function_is_called_in_an_image(bench: Bench) -> None:
    call = RayCall(function="work:look", image=bench.image, plan_dir=str(bench.folder))
    names = {"workflow_id": "flow", "run_id": bench.run_id, "call_id": "call", "log_dir": str(bench.folder)}
    handle = await bench.dispatch.attach_or_start(call.request(**names, attempt=1, plan_dir="/"), call.shape)
    result = await asyncio.wait_for(handle.wait(), 120)
    assert result.outputs["inside"] and result.image.startswith(f"{bench.image}@"), result


async def test_a_killed_container_fails_the_attempt_and_the_next_one_runs(bench: Bench) -> None:
    request = bench.shell("setsid sleep 600 & echo ready; sleep 600")
    handle = await bench.start(request, cpus=0.6)
    progress = await until(handle, lambda progress: progress.last_line == "ready")
    (container,) = [each for each in bench.containers() if each.attrs["State"]["Pid"] == progress.pid]
    children = psutil.Process(progress.pid).children(recursive=True)
    container.kill()
    result = await asyncio.wait_for(handle.wait(), 120)
    assert (result.outcome, result.reason, result.final) == ("failed", "infrastructure", False)
    assert (attempt_dir(request) / "stdout.log").read_text() == "ready\n"
    assert await until_true(lambda: not any(child.is_running() for child in children))
    assert await until_true(lambda: container.name not in bench.traces())
    again = request.model_copy(update={"attempt": 2, "params": {"command": "true"}})
    assert (await bench.run(again, cpus=0.6)).outcome == "succeeded"


async def test_cancel_and_timeout_end_a_step_in_its_container(bench: Bench) -> None:
    handle = await bench.start(bench.shell("trap '' TERM; echo ready; sleep 600"))
    progress = await until(handle, lambda progress: progress.last_line == "ready")
    children = psutil.Process(progress.pid).children(recursive=True)
    await handle.cancel()
    assert (await asyncio.wait_for(handle.wait(), 120)).outcome == "cancelled"
    assert await until_true(lambda: not any(child.is_running() for child in children))
    result = await bench.run(bench.shell("sleep 600", timeout_s=1))
    assert (result.outcome, result.reason) == ("timed_out", "timeout")


async def test_a_tag_that_moves_changes_nothing_for_the_run(bench: Bench) -> None:
    name = f"sygaldry-test/moving:{bench.run_id}"
    image = bench.engine.images.get(bench.image)
    image.tag(name)
    try:
        assert (await bench.run(bench.shell("true"), image=name)).image == f"{name}@{image.id}"
        bench.engine.images.remove(name)
        result = await bench.run(bench.shell("true"), image=name)
        assert (result.outcome, result.image) == ("succeeded", f"{name}@{image.id}")
        other = bench.shell("true", run_id="later")
        assert (await bench.run(other, image=name)).reason == "image"
    finally:
        if bench.engine.images.list(name):
            bench.engine.images.remove(name)


async def test_what_no_image_can_do_fails_with_the_reason(bench: Bench, small_image: str) -> None:
    wrong = f"sygaldry-test/wrong-ray:{bench.run_id}"
    labels = "LABEL sygaldry.ray_version=2.9.0"
    bench.engine.images.get(small_image).tag(wrong)
    container = bench.engine.containers.create(small_image, "true")
    try:
        bench.engine.images.remove(wrong)
        container.commit(*wrong.split(":"), changes=labels)
        missing, without, old = await asyncio.gather(
            bench.run(bench.shell("true"), image="127.0.0.1:9/none:1"),
            bench.run(bench.shell("true"), image=small_image),
            bench.run(bench.shell("true"), image=wrong),
        )
    finally:
        container.remove()
        bench.engine.images.remove(wrong)
    for result, words in (
        (missing, "cannot be pulled"),
        (without, "no `python3` or `python` on its PATH that has Ray"),
        (old, "is `2.9.0`, wanted"),
    ):
        assert (result.outcome, result.reason, result.final) == ("failed", "image", True)
        assert words in result.error and "hint:" in result.error
    no_gpu = await asyncio.to_thread(check_image, bench.image, "", True)
    assert "GPU" in no_gpu.error and "hint:" in no_gpu.error
    impossible = await bench.run(bench.shell("true"), gpus=3)
    assert impossible.reason == "infeasible"
    assert f"image `{bench.image}`" in impossible.error


async def test_an_actor_that_does_not_come_up_is_no_request_for_ever(bench: Bench) -> None:
    refused = await bench.run(bench.shell("true"), memory=1_000_000)
    killed = await bench.run(bench.shell("true"), memory=12_000_000)
    assert (refused.reason, killed.reason) == ("image", "image"), (refused, killed)
    assert "cannot be started" in refused.error and "6MB" in refused.error
    assert "killed because it needed more memory than its limit" in killed.error


@pytest.fixture
def image_node(bench: Bench, ray_image: str, docker_engine: Any) -> Iterator[str]:
    """A Ray node that runs in the image and says so; the label's value."""
    label = image_label(ray_image, docker_engine.images.get(ray_image).labels["sygaldry.content_hash"])
    token, kit = str(bench.head.token_file), str(ensure_kit(kits_root()))
    container = docker_engine.containers.run(
        ray_image,
        ["start", f"--address={bench.head.address}", f"--labels=image={label}", "--num-cpus=1", "--block"],
        entrypoint="ray",
        detach=True,
        network_mode="host",
        shm_size="200m",
        user=f"{os.getuid()}:{os.getgid()}",
        environment={
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": token,
            "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL": "minor",
            "PYTHONPATH": kit,
        },
        volumes={path: {"bind": path} for path in (token, kit, str(bench.folder))},
    )
    try:
        yield label
    finally:
        container.remove(force=True)


async def test_on_a_node_that_is_the_image_the_step_runs_directly(bench: Bench, image_node: str) -> None:
    before = {each.name for each in bench.containers()}
    request = bench.look(run_id=uuid.uuid4().hex[:8])
    labels = {"image": image_node}
    deadline = time.monotonic() + 60
    while (result := await bench.run(request, image="", labels=labels)).reason == "infeasible":
        assert time.monotonic() < deadline, result
        # The node needs the time more than we do.
        await asyncio.sleep(0.5)
        request = request.model_copy(update={"attempt": request.attempt + 1})
    result = await bench.run(bench.look(run_id=request.run_id))
    assert (result.outcome, result.image) == ("succeeded", f"{bench.image}@{image_node}"), result
    assert result.outputs["inside"] and result.outputs["limits"]["cpus"] in ("-1", "max")
    assert {each.name for each in bench.containers()} <= before


async def test_what_has_no_living_owner_is_reaped(docker_engine: Any, small_image: str) -> None:
    child = await asyncio.create_subprocess_exec("sleep", "600")
    owner = reaper.owner(child.pid)
    name = f"orchestrate-step-{uuid.uuid4().hex[:8]}"
    options = {"detach": True, "network_mode": "none", "labels": {reaper.OWNER_LABEL: owner}}
    docker_engine.containers.run(small_image, "sleep 600", name=name, **options)
    folder = reaper.make_private_folder(name)
    (folder / "owner").write_text(owner)
    assert name not in reaper.reap(os.environ) and folder.is_dir()
    child.kill()
    await child.wait()
    assert name in reaper.reap(os.environ)
    assert not docker_engine.containers.list(all=True, filters={"name": name}) and not folder.exists()
