"""Plans with steps on Ray: found again when the worker is killed, tried once more when the actor or Ray is killed."""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bridge import services
from bridge.client import TASK_QUEUE, Client
from bridge.plan import Plan, Step
from bridge.state import State
from bridge.temporal import connect_temporal

pytestmark = [pytest.mark.temporal, pytest.mark.ray]

PATIENCE_S = 120.0
FUNCTIONS = '''
import os, subprocess, time
from pathlib import Path

def count(name, pause_s, context):
    """Leaves a trace of every start and end, ten numbered lines, and tells its process."""
    with open(f"{name}.started", "a") as file:
        file.write(f"{os.getpid()}\\n")
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    Path(f"{name}.child").write_text(str(child.pid))
    for number in range(1, 11):
        print(f"line {number}", flush=True)
        context.heartbeat({"text": "counting", "fraction": number / 10})
        time.sleep(pause_s)
    child.kill()
    child.wait()
    with open(f"{name}.done", "a") as file:
        file.write("done\\n")
    return {"pid": os.getpid()}
'''


def counting(name: str, pause_s: float, **fields: Any) -> Step:
    arguments = {"name": name, "pause_s": pause_s}
    return Step.model_validate(
        {
            "id": name,
            "type": "python",
            "params": {"call": "functions:count", "arguments": arguments},
            "resources": {"cpus": 0.5},
            **fields,
        }
    )


async def connected(state: State) -> Client:
    address = (await asyncio.to_thread(services.ensure, state)).address
    return Client(await connect_temporal(address, None, state), TASK_QUEUE, state, local=True)


@pytest.fixture
async def client(local_state: State, tmp_path: Path) -> AsyncIterator[Client]:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    client = await connected(local_state)
    await asyncio.to_thread(services.start_ray, local_state)
    yield client


async def until(what: str, holds: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for: {what}"
        await asyncio.sleep(0.02)


def pid_of(state: State, name: str) -> int:
    return next(process["pid"] for process in services.status(state)["processes"] if process["name"] == name)


async def test_the_worker_is_killed_and_the_step_on_its_actor_goes_on(
    client: Client, local_state: State, tmp_path: Path
) -> None:
    run = await client.start(Plan(steps=[counting("long", 0.3)]), plan_dir=tmp_path)
    await until("the step has started", (tmp_path / "long.started").exists)
    os.kill(pid_of(local_state, "worker"), signal.SIGKILL)
    report = await client.wait(run.workflow_id, run.run_id)
    (step,) = report.steps
    assert step.outcome == "succeeded", step.error
    assert (tmp_path / "long.started").read_text() == f"{step.outputs['pid']}\n"
    assert (tmp_path / "long.done").read_text() == "done\n"
    assert Path(step.stdout_path).read_text() == "".join(f"line {number}\n" for number in range(1, 11))
    assert len(step.attempts) == 1


@pytest.mark.parametrize("victim", ["actor", "ray"])
async def test_the_actor_or_ray_is_killed_and_there_is_one_new_attempt(
    client: Client, local_state: State, tmp_path: Path, victim: str
) -> None:
    run = await client.start(Plan(steps=[counting("long", 0.3)]), plan_dir=tmp_path)
    await until("the step runs", lambda: (tmp_path / "long.child").exists() and (tmp_path / "long.child").read_text())
    child = int((tmp_path / "long.child").read_text())
    pid = int((tmp_path / "long.started").read_text()) if victim == "actor" else pid_of(local_state, "ray")
    if victim == "ray":
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(pid).children(recursive=True):
                if process.name() in ("raylet", "gcs_server"):
                    process.kill()
    # `ray start --block` may have seen its parts go, and be gone itself.
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    report = await client.wait(run.workflow_id, run.run_id)
    (step,) = report.steps
    assert step.outcome == "succeeded", step.error
    assert [attempt.reason for attempt in step.attempts] == ["infrastructure", ""]
    assert (tmp_path / "long.started").read_text().count("\n") == 2
    assert (tmp_path / "long.done").read_text() == "done\n"
    assert not psutil.pid_exists(child)


async def test_cancel_and_time_limit_reach_a_step_on_ray(client: Client, tmp_path: Path) -> None:
    steps = [counting("short", 30, timeout_seconds=1, allow_failure=True), counting("long", 30)]
    run = await client.start(Plan(steps=steps), plan_dir=tmp_path)
    await until("both run", lambda: (tmp_path / "long.child").exists() and (tmp_path / "short.child").exists())
    await asyncio.sleep(2)
    await client.cancel(run.workflow_id, run.run_id)
    report = await client.wait(run.workflow_id, run.run_id)
    assert {step.id: step.outcome for step in report.steps} == {"short": "timed_out", "long": "cancelled"}
    for name in ("short", "long"):
        assert not psutil.pid_exists(int((tmp_path / f"{name}.child").read_text()))


async def test_warm_actors_are_used_again_and_progress_is_seen(client: Client, tmp_path: Path) -> None:
    steps = [counting("a", 0.2), counting("b", 0, depends_on=["a"]), counting("c", 0, depends_on=["b"])]
    run = await client.start(Plan(steps=steps), plan_dir=tmp_path)
    seen, fractions = await client.progress(run.workflow_id, run.run_id), set()
    while seen.state == "running":
        fractions |= {step.progress.fraction for step in seen.steps if step.id == "a"}
        seen = await client.progress(run.workflow_id, run.run_id, since=seen.sequence, wait_s=0.2)
    report = await client.wait(run.workflow_id, run.run_id)
    assert report.outcome == "succeeded"
    assert len({step.outputs["pid"] for step in report.steps}) == 1
    assert fractions - {None}


async def test_what_no_node_can_give_fails_at_once_and_says_what_there_is(client: Client, tmp_path: Path) -> None:
    plan = Plan(steps=[counting("big", 0, resources={"gpus": 64})])
    report = await client.run(plan, plan_dir=tmp_path)
    (step,) = report.steps
    assert (step.outcome, step.reason) == ("failed", "infeasible")
    assert "64 GPU" in step.error


EFFECT = '''
import os, sys, time

def effect(name, pause_s):
    """Its side effect is the last thing it does."""
    time.sleep(pause_s)
    with open("effects", "a") as file:
        file.write(f"{name}\\n")
    return {"nice": os.nice(0)}
'''


def victims(state: State, kind: str) -> list[psutil.Process]:
    """Living processes of one kind that belong to this state's services."""
    pids = {process["name"]: process["pid"] for process in services.status(state)["processes"] if process["pid"]}
    root = pids.get("worker" if kind in ("worker", "cluster.driver") else "ray")
    found: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(root) if root else None
        if process is None or kind == "worker":
            return [process] if process else []
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if kind in " ".join([child.name(), *child.cmdline()]):
                    found.append(child)
    return found


async def test_killing_parts_of_ray_at_random_moments_loses_no_step(
    client: Client, local_state: State, tmp_path: Path
) -> None:
    """A step whose actor lives has its effect once; one whose actor is killed may be tried again, and says so."""
    (tmp_path / "effects.py").write_text(EFFECT)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    steps = [
        Step.model_validate(
            {
                "id": f"s{number}",
                "type": "python",
                "params": {
                    "call": "effects:effect",
                    "arguments": {"name": f"s{number}", "pause_s": round(chance.uniform(0.5, 1.5), 2)},
                },
                "resources": {"cpus": 0.5},
                "depends_on": [f"s{number - 4}"] if number > 3 else [],
                "retry": {"max_attempts": 12, "backoff_s": 0.1, "on": ["infrastructure"]},
            }
        )
        for number in range(12)
    ]
    run = await client.start(Plan(steps=steps), plan_dir=tmp_path)
    killed = []
    kinds = ["ray::StepActor", "ray::Pool", "cluster.driver", "worker", chance.choice(["raylet", "gcs_server"])]
    for kind in chance.sample(kinds, len(kinds)):
        await asyncio.sleep(chance.uniform(0.3, 1.5))
        found = await asyncio.to_thread(victims, local_state, kind)
        for victim in found and [chance.choice(found)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
                killed.append(kind)
    report = await client.wait(run.workflow_id, run.run_id)
    assert report.outcome == "succeeded", (killed, [step for step in report.steps if step.outcome != "succeeded"])
    assert {step.outputs["nice"] for step in report.steps} == {os.nice(0)}
    effects = (tmp_path / "effects").read_text().split()
    for step in report.steps:
        lost = [attempt for attempt in step.attempts if attempt.outcome != "succeeded"]
        assert {attempt.reason for attempt in lost} <= {"infrastructure"}
        assert 1 <= effects.count(step.id) <= 1 + len(lost), (killed, step.id)


async def test_a_secret_reaches_a_step_on_ray_and_nothing_else(
    client: Client, local_state: State, tmp_path: Path
) -> None:
    (local_state.secrets_dir / "token").write_text("correct-horse-battery")
    shell = {"type": "command", "resources": {"cpus": 0.5}, "secrets": {"TOKEN": "token"}}
    script = 'echo "$TOKEN"; [ ${#TOKEN} = 21 ] && env -0 | tr "\\0" "\\n" | grep -c "^ORCHESTRATE_SECRETS\\|^RAY_"'
    step = Step.model_validate({"id": "s", "params": {"command": "sh", "args": ["-c", script + " || true"]}, **shell})
    report = await client.run(Plan(secrets=["token"], steps=[step]), plan_dir=tmp_path)
    assert report.outcome == "succeeded", report.steps[0].error
    assert Path(report.steps[0].stdout_path).read_text() == "***\n0\n"
