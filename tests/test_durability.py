"""Nothing is lost and nothing is done twice, whatever is killed. Real services, `kill -9`, side effects counted."""

import asyncio
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from bridge import services
from bridge.client import TASK_QUEUE, Client
from bridge.plan import Plan, Step
from bridge.report import RunReport
from bridge.state import State
from bridge.temporal import connect_temporal
from steps._files import HOST, attempt_dir, read_json
from steps._request import StepRequest

pytestmark = pytest.mark.temporal

PATIENCE_S = 60.0


async def connected(state: State) -> Client:
    address = (await asyncio.to_thread(services.ensure, state)).address
    return Client(await connect_temporal(address, None, state), TASK_QUEUE, state, local=True)


def kill_service(state: State, name: str) -> None:
    pids = {process["name"]: process["pid"] for process in services.status(state)["processes"]}
    if pids.get(name):
        os.kill(pids[name], signal.SIGKILL)


def shell(step_id: str, script: str, **fields: Any) -> Step:
    return Step.model_validate(
        {"id": step_id, "type": "command", "params": {"command": "bash", "args": ["-c", script]}, **fields}
    )


COUNTING = """
echo $$ >> {name}.started
for n in 1 2 3 4 5 6 7 8 9 10; do echo "line $n"; sleep {pause_s}; done
echo done >> {name}.done
"""


def counting(name: str, pause_s: float, **fields: Any) -> Step:
    """A step that leaves a trace of every start and end, and ten numbered lines."""
    return shell(name, COUNTING.format(name=name, pause_s=pause_s), **fields)


async def until(what: str, holds: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for: {what}"
        await asyncio.sleep(0.02)


def assert_ran_once(folder: Path, report: RunReport, name: str) -> None:
    step = next(step for step in report.steps if step.id == name)
    assert (folder / f"{name}.started").read_text().count("\n") == 1
    assert (folder / f"{name}.done").read_text() == "done\n"
    assert Path(step.stdout_path).read_text() == "".join(f"line {n}\n" for n in range(1, 11))
    assert [attempt.number for attempt in step.attempts] == [1]


@pytest.mark.parametrize("victim", ["worker", "temporal", "supervisor"])
async def test_a_step_goes_on_when_a_service_is_killed(local_state: State, tmp_path: Path, victim: str) -> None:
    client = await connected(local_state)
    plan = Plan(steps=[counting("long", 0.2), shell("next", "echo next >> order", depends_on=["long"])])
    run = await client.start(plan, plan_dir=tmp_path)
    await until("the step has started", (tmp_path / "long.started").exists)
    kill_service(local_state, victim)
    report = await (await connected(local_state)).wait(run.workflow_id, run.run_id)
    assert report.outcome == "succeeded"
    assert_ran_once(tmp_path, report, "long")
    assert (tmp_path / "order").read_text() == "next\n"


async def test_everything_killed_and_started_again_goes_on_where_it_was(local_state: State, tmp_path: Path) -> None:
    client = await connected(local_state)
    plan = Plan(
        steps=[
            counting("first", 0.01),
            counting("long", 0.3, depends_on=["first"]),
            counting("last", 0.01, depends_on=["long"]),
        ]
    )
    run = await client.start(plan, plan_dir=tmp_path)
    await until("the second step has started", (tmp_path / "long.started").exists)
    for name in ("supervisor", "worker", "temporal"):
        kill_service(local_state, name)
    report = await (await connected(local_state)).wait(run.workflow_id, run.run_id)
    for name in ("first", "long", "last"):
        assert_ran_once(tmp_path, report, name)


async def test_steps_that_heed_sigterm_go_on_after_down_and_up(local_state: State, tmp_path: Path) -> None:
    """`down` tells every process to end. A step that obeys at once was not cancelled by that, and has not failed."""
    client = await connected(local_state)
    first = '[ "$STEP_ATTEMPT" = 1 ] || exit 0; touch {name}.started; '
    plan = Plan(
        name="laptop",
        steps=[
            shell("killed", first.format(name="killed") + "exec sleep 1000"),
            shell("polite", first.format(name="polite") + "trap 'exit 0' TERM; while :; do sleep 0.05; done"),
            shell("next", "echo next >> order", depends_on=["killed", "polite"]),
        ],
    )
    run = await client.start(plan, plan_dir=tmp_path)
    for name in ("killed", "polite"):
        await until(f"step `{name}` has started", (tmp_path / f"{name}.started").exists)
    await asyncio.to_thread(services.stop, local_state)
    report = await (await connected(local_state)).wait(run.workflow_id, run.run_id)
    assert report.outcome == "succeeded", report
    for step in report.steps[:2]:
        assert [(attempt.outcome, attempt.reason) for attempt in step.attempts] == [
            ("failed", "infrastructure"),
            ("succeeded", ""),
        ]
    assert (tmp_path / "order").read_text() == "next\n"


async def test_a_killed_step_process_is_one_new_attempt_after_its_children_are_dead(
    local_state: State, tmp_path: Path
) -> None:
    client = await connected(local_state)
    script = """
    if [ "$STEP_ATTEMPT" = 1 ]; then (setsid bash -c 'echo $$ > orphan; sleep 1000') & wait; fi
    kill -0 "$(cat orphan)" 2>/dev/null && echo alive > verdict || echo dead > verdict
    """
    run = await client.start(Plan(name="lost", steps=[shell("s", script)]), plan_dir=tmp_path)
    orphan = tmp_path / "orphan"
    await until("the grandchild runs", lambda: orphan.exists() and orphan.read_text().strip())
    request = StepRequest(
        workflow_id=run.workflow_id, run_id=run.run_id, step_id="s", step_name="s", attempt=1, type="command",
        params={}, plan_dir="/", working_dir="/", log_dir=run.log_dir, timeout_s=1,
    )  # fmt: skip
    host = read_json(attempt_dir(request) / HOST)
    assert host is not None
    os.kill(host["pid"], signal.SIGKILL)
    report = await client.wait(run.workflow_id, run.run_id)
    assert [(attempt.outcome, attempt.reason) for attempt in report.steps[0].attempts] == [
        ("failed", "infrastructure"),
        ("succeeded", ""),
    ]
    assert (tmp_path / "verdict").read_text() == "dead\n"
    assert not psutil.pid_exists(int(orphan.read_text()))


async def test_killing_at_random_moments_loses_nothing_and_repeats_nothing(local_state: State, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    client = await connected(local_state)
    steps = [
        shell(
            f"s{n}",
            f"sleep {chance.random() * 0.4:.3f}; echo {n} >> effects",
            depends_on=[f"s{n - 3}"] if n > 2 else [],
        )
        for n in range(24)
    ]
    run = await client.start(Plan(steps=steps), plan_dir=tmp_path)
    for _ in range(6):
        await asyncio.sleep(chance.random() * 0.8)
        await asyncio.to_thread(
            kill_service, local_state, chance.choice(["worker", "temporal", "worker", "supervisor"])
        )
        await asyncio.to_thread(services.ensure, local_state)
    report = await (await connected(local_state)).wait(run.workflow_id, run.run_id)
    assert report.outcome == "succeeded", [step for step in report.steps if step.outcome != "succeeded"]
    assert sorted(map(int, (tmp_path / "effects").read_text().split())) == list(range(24))
    assert {len(step.attempts) for step in report.steps} == {1}
