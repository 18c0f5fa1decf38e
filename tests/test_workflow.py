"""Plans run for real: Temporal server, worker in this process, forked steps."""

import asyncio
import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from bridge.activities import Activities
from bridge.cache import StepCache
from bridge.calls import Finish
from bridge.client import Client, RunConflict, RunNotFound
from bridge.dispatch import LocalDispatch
from bridge.plan import Param, Plan, Step
from bridge.reader import read_plan_text
from bridge.records import events_of, run_dir
from bridge.report import RunReport, StepReport
from bridge.workflow import PlanWorkflow, _failure
from steps._files import HOST

pytestmark = pytest.mark.temporal


@pytest.fixture
async def client(open_client: Callable[..., Any], temporal_server: str, tmp_path: Path) -> AsyncIterator[Client]:
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


def test_a_failure_always_names_steps() -> None:
    now: dict[str, Any] = {"started_at": 1.0, "finished_at": 2.0, "duration_s": 1.0, "workflow_id": "w", "run_id": "r"}
    good = StepReport(id="good", type="command", outcome="succeeded")
    ended = StepReport(id="ended", type="command", outcome="cancelled", error="cancelled")
    after = StepReport(id="after", type="command", outcome="skipped", error="`ended` cancelled")
    bad = StepReport(id="bad", type="command", outcome="failed", error="exit code 7")
    run = RunReport(plan="demo", outcome="failed", steps=[good, ended, after], **now)
    assert _failure(run) == "plan `demo` failed in `ended`: cancelled"
    assert _failure(run.model_copy(update={"steps": [ended, bad]})) == "plan `demo` failed in `bad`: exit code 7"


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


async def test_a_retry_makes_anew_what_was_made_from_something_that_failed(client: Client, tmp_path: Path) -> None:
    script = """
    echo $N >> shards
    test $N != 1 || test -e open || exit 1
    echo "{\\"n\\": $N}" >> $STEP_OUTPUTS
    """
    plan = Plan(
        steps=[
            shell("shard", script, matrix={"n": [0, 1, 2]}, env={"N": "${{ matrix.n }}"}, allow_failure=True),
            shell("merge", "echo $V >> merged", when="always", env={"V": "${{ steps.shard.outputs.n }}"}),
            shell("publish", "echo x >> published", depends_on=["merge"]),
            shell("other", "echo x >> other"),
        ]
    )
    first = await client.run(plan, plan_dir=tmp_path, log_dir=tmp_path / "logs")
    assert first.outcome == "succeeded"
    (tmp_path / "open").touch()
    again = await client.retry(first.workflow_id, first.run_id)
    assert (await client.wait(again.workflow_id, again.run_id)).outcome == "succeeded"
    ran = {name: (tmp_path / name).read_text().splitlines() for name in ("shards", "merged", "published", "other")}
    assert sorted(ran["shards"]) == ["0", "1", "1", "2"]
    assert [json.loads(line) for line in ran["merged"]] == [[0, None, 2], [0, 1, 2]]
    assert (len(ran["published"]), len(ran["other"])) == (2, 1)


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


async def test_a_step_that_changes_its_own_input_is_cached_for_what_it_has_read(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It goes on for longer than its first activity, so another one sees its end, and the changed input.
    monkeypatch.setattr("bridge.activities.BRIEF_S", 1.5)
    script = "cat data.txt >> seen; echo 2 > data.txt; sleep 2"
    plan = Plan(name="own", steps=[shell("read", script, cache={"inputs": ["data.txt"]})])
    for value, reason in (("1", ""), ("2", ""), ("1", "cached")):
        (tmp_path / "data.txt").write_text(f"{value}\n")
        report = await client.run(plan, plan_dir=tmp_path, log_dir=tmp_path / "logs")
        assert (report.outcome, report.steps[0].reason) == ("succeeded", reason)
    assert (tmp_path / "seen").read_text() == "1\n2\n"


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


@pytest.mark.parametrize("local", [True, False], ids=["local", "remote"])
async def test_a_log_directory_that_cannot_be_used_fails_the_steps(
    open_client: Callable[..., Any], temporal_server: str, tmp_path: Path, local: bool
) -> None:
    (tmp_path / "logs").write_text("a file")
    plan = Plan(steps=[shell("a", "touch ran"), shell("b", "touch ran", cache=True)])
    async with open_client(temporal_server, tmp_path, local=local) as client, asyncio.timeout(60):
        report = await client.run(plan, plan_dir=tmp_path, log_dir=tmp_path / "logs")
    assert report.outcome == "failed"
    for step in report.steps:
        assert [attempt.reason for attempt in step.attempts] == ["infrastructure"] * 3
        assert step.error.startswith(f"step `{step.id}` cannot start: [Errno 20] Not a directory: ")
        assert f"hint: its files go to `{tmp_path}/logs`" in step.error
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"type": "python", "params": {"call": "${{ params.call }}"}, "cache": True}, "params that `python` refuses"),
        # A file that everybody can open and nobody can read from its beginning.
        ({"cache": {"inputs": ["/proc/self/mem"]}}, "cannot be looked up in the cache: [Errno 5]"),
        ({"cache": {"inputs": ["in/**.csv"]}}, "cannot be looked up in the cache: Invalid pattern"),
    ],
)
async def test_a_step_that_the_cache_cannot_be_asked_about_fails_and_the_others_run(
    client: Client, tmp_path: Path, bad: dict[str, Any], said: str
) -> None:
    wrong = Step.model_validate({"id": "bad", "type": "command", "params": {"command": "true"}, **bad})
    plan = Plan(params={"call": Param(default="train")}, steps=[shell("good", "true", cache=True), wrong])
    async with asyncio.timeout(60):
        report = await client.run(plan, plan_dir=tmp_path, log_dir=tmp_path / "logs")
    steps = by_id(report)
    assert (report.outcome, steps["good"].outcome) == ("failed", "succeeded")
    assert (steps["bad"].reason, len(steps["bad"].attempts)) == ("error", 1)
    assert said in steps["bad"].error
    folder = run_dir(tmp_path / "logs", report.workflow_id, report.run_id)
    (told,) = [event.message for event in events_of(folder) if event.step_id == "bad"]
    assert told == steps["bad"].error


async def test_the_folder_of_another_step_fails_the_step(client: Client, tmp_path: Path) -> None:
    gate = shell("gate", "while ! test -e open; do sleep 0.05; done")
    plan = Plan(steps=[gate, shell("after", "touch ran", depends_on=["gate"])])
    run = await client.start(plan, plan_dir=tmp_path, log_dir=tmp_path / "logs")
    folder = run_dir(tmp_path / "logs", run.workflow_id, run.run_id) / "after" / "attempt-1"
    folder.mkdir(parents=True)
    (folder / HOST).write_text(json.dumps({"key": "another/key/1", "node": "here"}))
    (tmp_path / "open").touch()
    async with asyncio.timeout(60):
        after = by_id(await client.wait(run.workflow_id, run.run_id))["after"]
    assert (after.outcome, after.reason, len(after.attempts)) == ("failed", "error", 1)
    assert "belongs to `another/key/1`" in after.error
    assert not (tmp_path / "ran").exists()


async def test_the_last_report_is_written_beside_other_work(tmp_path: Path) -> None:
    log = tmp_path / "stdout.log"
    os.mkfifo(log)
    step = StepReport(id="a", outcome="succeeded", stdout_path=str(log), stderr_path=str(log))
    times: dict[str, Any] = {"started_at": 0.0, "finished_at": 1.0, "duration_s": 1.0}
    report = RunReport(workflow_id="w", run_id="r", plan="p", outcome="succeeded", steps=[step], **times)
    activities = Activities(lambda call: LocalDispatch(), StepCache(tmp_path / "cache.db"), tmp_path / "secrets")
    rescue = threading.Timer(20, log.write_text, [""])
    rescue.start()
    finishing = asyncio.create_task(activities.finish(Finish(report=report, log_dir=str(tmp_path))))
    await asyncio.sleep(0.1)
    assert not finishing.done(), "its end waits for a writer of the log, which nobody else waits for"
    rescue.cancel()
    await asyncio.to_thread(log.write_text, "")
    await finishing


async def test_a_value_that_is_missing_at_run_time_fails_the_step_that_needs_it(client: Client, tmp_path: Path) -> None:
    plan = Plan(steps=[shell("a", "true"), shell("b", "true", env={"X": "${{ steps.a.outputs.nope }}"})])
    steps = by_id(await client.run(plan, plan_dir=tmp_path, log_dir=tmp_path / "logs"))
    assert steps["b"].outcome == "failed"
    assert "nope" in steps["b"].error
    assert json.dumps(steps["b"].outputs) == "{}"


@pytest.mark.parametrize("local", [True, False], ids=["local", "remote"])
async def test_a_long_run_goes_on_in_new_executions_and_keeps_its_running_steps(
    open_client: Callable[..., Any], make_temporal_server: Callable[..., str], tmp_path: Path, local: bool
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


@pytest.mark.parametrize("how", ["failed", "cancelled"])
async def test_what_stops_a_run_that_is_about_to_leave_for_a_new_execution_is_not_lost(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    # It wants to leave when `first` has ended, and must wait for `last`, which began as a local activity.
    monkeypatch.setattr("bridge.activities.BRIEF_S", 30.0)
    monkeypatch.setattr(
        PlanWorkflow,
        "_is_history_long",
        lambda self: self._run.started_at is None and len(self._schedule.reports()) == 1 and not self._schedule.stopped,
    )
    steps = [
        shell("first", "true"),
        shell("last", "touch begun; while ! test -e open; do sleep 0.05; done; exit 1"),
        shell("next", "true", depends_on=["first"]),
        shell("unrelated", "true", depends_on=["next"]),
    ]
    async with asyncio.timeout(60):
        run = await client.start(Plan(name="leaving", steps=steps), plan_dir=tmp_path, log_dir=tmp_path / "logs")
        while not (tmp_path / "begun").exists():
            await asyncio.sleep(0.02)
        # By now `first`, which is quicker, has ended.
        await asyncio.sleep(0.3)
        if how == "cancelled":
            await client.cancel(run.workflow_id, run.run_id)
        else:
            (tmp_path / "open").touch()
        report = await client.wait(run.workflow_id, run.run_id)
    assert report.outcome == how
    outcomes = {step.id: step.outcome for step in report.steps}
    assert (outcomes["first"], outcomes["last"]) == ("succeeded", how)
    assert outcomes["unrelated"] != "succeeded"


@pytest.mark.parametrize("local", [True, False], ids=["local", "remote"])
async def test_more_steps_than_temporal_allows_at_once(
    open_client: Callable[..., Any], temporal_server: str, tmp_path: Path, local: bool
) -> None:
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
