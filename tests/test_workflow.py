"""Plans run for real: Temporal server, worker in this process, forked steps."""

import asyncio
import contextlib
import hashlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from bridge.activities import Activities
from bridge.cache import StepCache
from bridge.client import Client, RunConflict, RunNotFound
from bridge.dispatch import LocalDispatch
from bridge.plan import Param, Plan, Step
from bridge.reader import read_plan_text
from bridge.records import events_of, run_dir
from bridge.report import RunReport
from bridge.state import State
from bridge.temporal import connect_temporal
from bridge.worker import make_worker

pytestmark = pytest.mark.temporal


@contextlib.asynccontextmanager
async def open_client(address: str, folder: Path, *, local: bool) -> AsyncIterator[Client]:
    """A client whose runs are served by a worker in this process."""
    state = State(folder / "state").create()
    temporal = await connect_temporal(address, None, state)
    dispatch = LocalDispatch()
    dispatch.start()
    activities = Activities(lambda call: dispatch, StepCache(state.cache_file), state.secrets_dir)
    queue = f"queue-{uuid.uuid4().hex}"
    async with make_worker(temporal, queue, activities, drain_s=0):
        yield Client(temporal, queue, state, local=local)
    dispatch.close()


@pytest.fixture
async def client(temporal_server: str, tmp_path: Path) -> AsyncIterator[Client]:
    async with open_client(temporal_server, tmp_path, local=True) as client:
        yield client


def shell(step_id: str, script: str, **fields: Any) -> Step:
    return Step.model_validate(
        {"id": step_id, "type": "command", "params": {"command": "bash", "args": ["-c", script]}, **fields}
    )


def by_id(report: RunReport) -> dict[str, Any]:
    return {step.id: step for step in report.steps}


async def test_values_flow_from_params_and_outputs_into_later_steps(client: Client, tmp_path: Path) -> None:
    text = """
params: {who: {type: string}, times: {type: integer, default: 2}}
env: {GREETING: "hello ${{ params.who }}"}
steps:
  - id: a
    type: command
    command: bash
    args: [-c, 'echo "{\\"words\\": [\\"$GREETING\\", \\"x\\"]}" >> $STEP_OUTPUTS']
  - id: b
    type: python
    python: {call: "json:dumps", arguments: {obj: "${{ steps.a.outputs.words }}"}}
  - {id: c, type: command, command: echo, args: ["${{ steps.b.outputs.result }}", "${{ params.times }}"]}
"""
    loaded = read_plan_text(text, tmp_path / "flow.yaml")
    report = await client.run(loaded, params={"who": "a b"}, log_dir=tmp_path / "logs")
    steps = by_id(report)
    assert report.outcome == "succeeded"
    assert report.plan == "flow"
    assert steps["b"].outputs == {"result": '["hello a b", "x"]'}
    assert Path(steps["c"].stdout_path).read_text() == '["hello a b", "x"] 2\n'
    assert steps["c"].attempts[0].outcome == "succeeded"


async def test_a_failed_run_has_a_complete_report_and_event_log(client: Client, tmp_path: Path) -> None:
    plan = Plan(
        name="failing",
        steps=[
            shell("bad", "echo reason >&2; exit 7"),
            shell("after", "true", depends_on=["bad"]),
            shell("handler", "echo handled", when={"step": "bad", "exit_code": 7}),
        ],
    )
    report = await client.run(plan, plan_dir=tmp_path, log_dir=tmp_path / "logs")
    steps = by_id(report)
    assert report.outcome == "failed"
    assert (steps["bad"].outcome, steps["bad"].exit_code, steps["bad"].reason) == ("failed", 7, "exit_code")
    assert (steps["after"].outcome, steps["after"].error) == ("skipped", "`bad` failed")
    assert steps["handler"].outcome == "succeeded"
    folder = run_dir(tmp_path / "logs", report.workflow_id, report.run_id)
    written = RunReport.model_validate_json((folder / "report.json").read_text())
    assert by_id(written)["bad"].stderr_tail == "reason\n"
    events = [(event.status, event.step_id) for event in events_of(folder)]
    assert events[0] == ("run_started", "")
    assert events[-1] == ("run_finished", "")
    assert sorted(events[1:-1]) == [
        ("step_finished", "bad"),
        ("step_finished", "handler"),
        ("step_skipped", "after"),
        ("step_started", "bad"),
        ("step_started", "handler"),
    ]


async def test_retry_keeps_the_logs_of_every_attempt_and_stops_at_what_it_is_not_for(
    client: Client, tmp_path: Path
) -> None:
    script = (
        'echo "try $STEP_ATTEMPT"; n=$(cat count 2>/dev/null || echo 0); echo $((n+1)) > count; exit $((n < 2 ? 5 : 0))'
    )
    plan = Plan(
        steps=[
            shell("flaky", script, retry={"max_attempts": 5, "backoff_s": 0.01, "on": [5]}, allow_failure=True),
            shell("other", "exit 6", retry={"max_attempts": 5, "backoff_s": 0.01, "on": [5]}, allow_failure=True),
            shell(
                "slow", "sleep 60", timeout_seconds=0.3, retry={"max_attempts": 2, "backoff_s": 0, "on": ["timeout"]}
            ),
        ]
    )
    steps = by_id(await client.run(plan, plan_dir=tmp_path, log_dir=tmp_path / "logs"))
    assert [attempt.exit_code for attempt in steps["flaky"].attempts] == [5, 5, 0]
    logs = Path(steps["flaky"].stdout_path).parents[1]
    assert [(logs / f"attempt-{n}" / "stdout.log").read_text() for n in (1, 2, 3)] == ["try 1\n", "try 2\n", "try 3\n"]
    assert len(steps["other"].attempts) == 1
    assert [attempt.outcome for attempt in steps["slow"].attempts] == ["timed_out", "timed_out"]


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"cpus": "${{ params.amount }}"}, "`cpus` of `resources` is `many`, wanted a number"),
        ({"memory": "${{ params.amount }}"}, "`memory` of `resources` is `many`, wanted bytes"),
        ({"custom": {"slot": "${{ -1 }}"}}, "`slot` of `resources` is `-1`, wanted a number of at least 0"),
        ({"nodes": "${{ 1.5 }}"}, "`nodes` of `resources` is `1.5`, wanted a whole number of at least 1"),
        ({"nodes": "${{ 2 }}", "actor": "a"}, "a step on several nodes cannot name an `actor`"),
    ],
)
async def test_resources_that_turn_out_wrong_fail_the_step_at_once(
    client: Client, tmp_path: Path, resources: dict[str, Any], said: str
) -> None:
    plan = Plan(params={"amount": Param(default="many")}, steps=[shell("a", "true", resources=resources)])
    report = await client.run(plan, plan_dir=tmp_path, log_dir=tmp_path / "logs")
    assert (report.outcome, len(report.steps[0].attempts)) == ("failed", 1)
    assert said in report.steps[0].error


async def test_a_watcher_sees_the_next_attempt_and_why_there_is_one(client: Client, tmp_path: Path) -> None:
    plan = Plan(steps=[shell("flaky", "exit 5", retry={"max_attempts": 2, "backoff_s": 60, "on": [5]})])
    handle = await client.start(plan, plan_dir=tmp_path, log_dir=tmp_path / "logs")
    sequence, step = 0, None
    for _ in range(60):
        progress = await client.progress(handle.workflow_id, handle.run_id, since=sequence, wait_s=1)
        sequence, step = progress.sequence, progress.steps[0] if progress.steps else step
        if step is not None and step.attempt == 2:
            break
    assert step is not None and (step.state, step.attempt) == ("running", 2)
    assert step.error == "`bash` ended with exit code 5"
    await client.cancel(handle.workflow_id, handle.run_id)
    report = await client.wait(handle.workflow_id, handle.run_id)
    assert (report.outcome, len(report.steps[0].attempts)) == ("cancelled", 1)


async def test_cancel_ends_what_runs_and_still_cleans_up(client: Client, tmp_path: Path) -> None:
    plan = Plan(
        steps=[
            shell("long", "trap 'echo told; exit 1' TERM; sleep 60 & wait"),
            shell("next", "true", depends_on=["long"]),
            shell("clean", "echo cleaned", when="always", depends_on=["next"]),
        ]
    )
    run = await client.start(plan, plan_dir=tmp_path, log_dir=tmp_path / "logs")
    while (await client.progress(run.workflow_id, run.run_id)).counts.get("running") != 1:
        await asyncio.sleep(0.05)
    folder = run_dir(tmp_path / "logs", run.workflow_id, run.run_id)
    while not (folder / "long" / "attempt-1" / "host.json").exists():
        await asyncio.sleep(0.05)
    await client.cancel(run.workflow_id, run.run_id)
    report = await client.wait(run.workflow_id, run.run_id)
    assert report.outcome == "cancelled"
    assert {step.id: step.outcome for step in report.steps} == {
        "long": "cancelled",
        "next": "skipped",
        "clean": "succeeded",
    }
    (summary,) = [one for one in await client.runs() if one.workflow_id == run.workflow_id]
    assert summary.state == "cancelled"


async def test_on_failure_cancel_ends_the_running_siblings(client: Client, tmp_path: Path) -> None:
    plan = Plan(on_failure="cancel", steps=[shell("bad", "sleep 0.5; exit 1"), shell("long", "sleep 60")])
    started = time.monotonic()
    report = await client.run(plan, plan_dir=tmp_path, log_dir=tmp_path / "logs")
    assert {step.id: step.outcome for step in report.steps} == {"bad": "failed", "long": "cancelled"}
    assert report.outcome == "failed"
    assert time.monotonic() - started < 30


async def test_retry_runs_only_what_did_not_succeed(client: Client, tmp_path: Path) -> None:
    plan = Plan(
        steps=[
            shell("once", "echo x >> once.txt; echo '{\"n\": 4}' >> $STEP_OUTPUTS"),
            shell("gate", "test -e open", depends_on=["once"]),
            shell("last", "echo $N > last.txt", depends_on=["gate"], env={"N": "${{ steps.once.outputs.n }}"}),
        ]
    )
    first = await client.run(plan, plan_dir=tmp_path, log_dir=tmp_path / "logs")
    assert first.outcome == "failed"
    (tmp_path / "open").touch()
    again = await client.retry(first.workflow_id, first.run_id)
    second = await client.wait(again.workflow_id, again.run_id)
    assert second.outcome == "succeeded"
    assert (tmp_path / "once.txt").read_text() == "x\n"
    assert (tmp_path / "last.txt").read_text() == "4\n"
    assert (await client.report(first.workflow_id, first.run_id)).outcome == "failed"


async def test_promised_artifacts_are_in_the_report_and_in_the_cache(client: Client, tmp_path: Path) -> None:
    script = 'mkdir -p out; echo made > "out/$N"; echo ran >> runs'
    steps = [
        shell("make", script, env={"N": "a.txt"}, artifacts=["out/${{ env.N }}"], cache=True),
        shell("forget", "true", artifacts=["none/*.bin"], allow_failure=True),
    ]
    first = await client.run(Plan(steps=steps), plan_dir=tmp_path, log_dir=tmp_path / "logs")
    digest = hashlib.sha256(b"made\n").hexdigest()
    assert first.steps[0].artifacts == {"out/a.txt": f"sha256:{digest}"}
    assert (first.steps[1].outcome, first.steps[1].error) == (
        "failed",
        "the step did not make its declared artifact `none/*.bin`",
    )
    second = await client.run(Plan(steps=steps[:1]), plan_dir=tmp_path, log_dir=tmp_path / "logs")
    assert (second.steps[0].reason, second.steps[0].artifacts) == ("cached", first.steps[0].artifacts)
    (tmp_path / "out" / "a.txt").write_text("changed")
    await client.run(Plan(steps=steps[:1]), plan_dir=tmp_path, log_dir=tmp_path / "logs")
    assert (tmp_path / "runs").read_text() == "ran\nran\n"


async def test_cached_steps_give_their_old_outputs(client: Client, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("1")
    plan = Plan(
        name="cached",
        steps=[
            shell(
                "read",
                'echo ran >> runs; echo "{\\"v\\": $(cat data.txt)}" >> $STEP_OUTPUTS',
                cache={"inputs": ["data.txt"]},
            ),
            shell("use", "echo ran >> runs", cache=True, env={"V": "${{ steps.read.outputs.v }}"}),
        ],
    )
    await client.run(plan, plan_dir=tmp_path, log_dir=tmp_path / "logs")
    second = await client.run(plan, plan_dir=tmp_path, log_dir=tmp_path / "logs")
    assert [(step.reason, step.attempts) for step in second.steps] == [("cached", []), ("cached", [])]
    assert second.steps[0].outputs == {"v": 1}
    assert (tmp_path / "runs").read_text() == "ran\nran\n"
    (tmp_path / "data.txt").write_text("2")
    third = await client.run(plan, plan_dir=tmp_path, log_dir=tmp_path / "logs")
    assert [step.reason for step in third.steps] == ["", ""]
    assert third.steps[0].outputs == {"v": 2}


async def test_progress_tells_what_changed_and_what_running_steps_say(client: Client, tmp_path: Path) -> None:
    plan = Plan(steps=[shell("talk", "echo working on it; while ! test -e stop; do sleep 0.05; done")])
    run = await client.start(plan, plan_dir=tmp_path, log_dir=tmp_path / "logs")
    seen = await client.progress(run.workflow_id, run.run_id, since=0, wait_s=5)
    deadline = time.monotonic() + 30
    while not any(step.progress.last_line == "working on it" for step in seen.steps):
        assert time.monotonic() < deadline
        seen = await client.progress(run.workflow_id, run.run_id, since=seen.sequence, wait_s=0.3)
    assert seen.state == "running"
    (tmp_path / "stop").touch()
    while seen.state == "running":
        seen = await client.progress(run.workflow_id, run.run_id, since=seen.sequence, wait_s=5)
    assert seen.state == "succeeded"
    assert seen.counts == {"succeeded": 1}


async def test_conflicts_and_unknown_runs(client: Client, tmp_path: Path) -> None:
    plan = Plan(steps=[shell("wait", "while ! test -e stop; do sleep 0.05; done")])
    run = await client.start(plan, plan_dir=tmp_path, workflow_id=f"w-{uuid.uuid4().hex}")
    with pytest.raises(RunConflict, match="goes on"):
        await client.start(plan, plan_dir=tmp_path, workflow_id=run.workflow_id)
    with pytest.raises(RunConflict, match="cancel"):
        await client.retry(run.workflow_id)
    with pytest.raises(RunNotFound, match="no run `nope`"):
        await client.report("nope")
    (tmp_path / "stop").touch()
    assert (await client.wait(run.workflow_id)).outcome == "succeeded"


async def test_outputs_over_temporals_limit_travel(client: Client, tmp_path: Path) -> None:
    big = "import json,os\nopen(os.environ['STEP_OUTPUTS'],'a').write(json.dumps({'blob': os.urandom(400_000).hex()}))"
    plan = Plan(
        steps=[
            *(
                Step(id=f"big{n}", type="command", params={"command": "python", "args": ["-c", big]}, outputs=["blob"])
                for n in range(4)
            ),
            Step.model_validate(
                {
                    "id": "all",
                    "type": "python",
                    "params": {
                        "call": "builtins:len",
                        "arguments": {},
                    },
                    "allow_failure": True,
                    "depends_on": ["big0"],
                }
            ),
            shell("size", "true", depends_on=[f"big{n}" for n in range(4)]),
        ]
    )
    report = await client.run(plan, plan_dir=tmp_path, log_dir=tmp_path / "logs")
    steps = by_id(report)
    assert report.outcome == "succeeded"
    assert all(len(steps[f"big{n}"].outputs["blob"]) == 800_000 for n in range(4))


async def test_a_value_that_is_missing_at_run_time_fails_the_step_that_needs_it(client: Client, tmp_path: Path) -> None:
    plan = Plan(steps=[shell("a", "true"), shell("b", "true", env={"X": "${{ steps.a.outputs.nope }}"})])
    steps = by_id(await client.run(plan, plan_dir=tmp_path, log_dir=tmp_path / "logs"))
    assert steps["b"].outcome == "failed"
    assert "nope" in steps["b"].error
    assert json.dumps(steps["b"].outputs) == "{}"


@pytest.mark.parametrize("local", [True, False], ids=["local", "remote"])
async def test_a_long_run_goes_on_in_new_executions_and_keeps_its_running_steps(
    make_temporal_server: Callable[..., str], tmp_path: Path, local: bool
) -> None:
    # Steps that begin as local activities leave a sixth of the events, and those only every second.
    most_events, pause_s = (15, 0.3) if local else (60, 0)
    address = make_temporal_server(f"limit.historyCount.suggestContinueAsNew={most_events}")
    async with open_client(address, tmp_path, local=local) as client:
        steps = [
            shell(f"s{n}", f"echo {n} >> effects; sleep {pause_s}", depends_on=[f"s{n - 2}"] if n > 1 else [])
            for n in range(40)
        ]
        slow = shell("slow", "echo slow >> effects; echo begun; while ! test -e stop; do sleep 0.05; done; echo ended")
        after = shell("after", "touch stop", depends_on=["s39"])
        run = await client.start(
            Plan(name="long", steps=[slow, *steps, after]), plan_dir=tmp_path, log_dir=tmp_path / "logs"
        )
        report = await client.wait(run.workflow_id, run.run_id)
        executions = [one async for one in client.temporal.list_workflows(f'WorkflowId="{run.workflow_id}"')]
    assert len(executions) > 1
    assert report.outcome == "succeeded"
    assert report.run_id == run.run_id
    assert len(report.steps) == 42
    assert sorted((tmp_path / "effects").read_text().split()) == sorted(["slow", *(str(n) for n in range(40))])
    assert Path(by_id(report)["slow"].stdout_path).read_text() == "begun\nended\n"
    assert [attempt.number for attempt in by_id(report)["slow"].attempts] == [1]


@pytest.mark.parametrize("local", [True, False], ids=["local", "remote"])
async def test_more_steps_than_temporal_allows_at_once(temporal_server: str, tmp_path: Path, local: bool) -> None:
    plan = Plan(
        name="wide",
        steps=[
            Step(id="all", type="command", params={"command": "true"}, matrix={"n": list(range(2001))}),
            shell("last", "true", depends_on=["all"]),
        ],
    )
    async with open_client(temporal_server, tmp_path, local=local) as client:
        report = await client.run(plan, plan_dir=tmp_path, log_dir=tmp_path / "logs")
    assert report.outcome == "succeeded"
    assert len(report.steps) == 2002
