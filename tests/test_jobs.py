"""Jobs without a service: names, the plan that a job is, its files whatever happens to their writers, its judgement."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from temporalio.testing import ActivityEnvironment

from bridge.calls import Finish
from bridge.expressions import render, render_params
from bridge.job_files import JobFiles, Kept, status_line
from bridge.job_keeper import conclude, kept
from bridge.job_look import health, look
from bridge.jobs import JobError, JobOptions, JobRecord, known_roots, new_record, plan_text, records
from bridge.reader import read_plan_text
from bridge.report import RunReport, StepReport
from steps._files import HOST, RESULT
from steps._process import TOLD_TO_END, identity
from steps._request import Progress, StepResult
from steps.container_job import Params

RUN_ID = "run-1"


@pytest.fixture
def make_record(tmp_path: Path) -> Callable[..., JobRecord]:
    def make(job: str = "train", **fields: Any) -> JobRecord:
        env = {"SYGALDRY_CONTAINER_ROOT": str(tmp_path / "root")}
        return new_record(job, "demo", fields.pop("command", ["true"]), env, **fields)

    return make


class Attempts:
    """What a step's host leaves in the folders of a job's attempts."""

    def __init__(self, record: JobRecord, run_id: str = RUN_ID) -> None:
        self.folder = record.folder / run_id / "job"
        self.expected = ""

    def begin(self, **changes: Any) -> Path:
        folder = self.folder / f"attempt-{len(list(self.folder.glob('attempt-*'))) + 1}"
        folder.mkdir(parents=True)
        host = {**identity(), "isolated": True, "node": os.uname().nodename, "key": "k", **changes}
        (folder / HOST).write_text(json.dumps(host))
        return folder

    def print(self, text: str, partial: bool = False) -> None:
        newest = max(self.folder.iterdir(), key=lambda path: int(path.name.partition("-")[2]))
        with (newest / "structured.jsonl").open("a") as file:
            file.write(json.dumps({"message": text, "partial": partial, "stream": "stdout"}) + "\n")
        self.expected += text if partial else f"{text}\n"


def begun(record: JobRecord, **host: Any) -> tuple[JobFiles, Attempts]:
    """A launched job whose first attempt runs in the process that `host` describes, by default this one."""
    files, attempts = JobFiles(record), Attempts(record)
    files.begin()
    attempts.begin(**host)
    files.catch_up(RUN_ID, is_running=True)
    return files, attempts


def events(files: JobFiles) -> list[str]:
    found = []
    for line in files.events.read_text().splitlines():
        if line.endswith("}"):
            event = json.loads(line)
            assert set(event) == {"ts", "event", "job", "msg"} and event["job"] == files.record.job
            found.append(event["event"])
    return found


def gone() -> dict[str, Any]:
    """A process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stat = Path(f"/proc/{process.pid}/stat").read_text()
    process.communicate()
    return {"pid": process.pid, "start_ticks": int(stat.rpartition(")")[2].split()[19])}


words = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12),
        st.sampled_from(
            ["${{", "}}", "${{ x }}", "'", '"', "$HOME", "a b", "\n", "\u2028", "\x85", "\\", "~", "*", "é"]
        ),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(arguments=words, value=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0")))
def test_every_word_and_value_arrives_as_it_was_given(
    tmp_path_factory: pytest.TempPathFactory, arguments: list[str], value: str
) -> None:
    env = {"SYGALDRY_CONTAINER_ROOT": "/nowhere"}
    record = new_record("job", "demo", ["printf", "%s\\0", *arguments], env)
    plan = read_plan_text(plan_text(record, JobOptions(env={"V": value})), Path("/project/job.yaml")).plan
    params = render_params(Params, plan.steps[0].params, {"params": {}, "steps": {}, "env": {}})
    assert params["env"] == {"V": value}
    done = subprocess.run(["bash", "-c", params["command"]], capture_output=True, check=True, timeout=30)
    assert done.stdout.decode().split("\0")[:-1] == arguments


def test_one_word_is_a_command_line(make_record: Callable[..., JobRecord]) -> None:
    record = make_record(command=["echo a  b; echo '${{ c }}' | tr c d"])
    plan = read_plan_text(plan_text(record, JobOptions()), Path("/project/job.yaml")).plan
    params = render_params(Params, plan.steps[0].params, {})
    done = subprocess.run(["bash", "-c", params["command"]], capture_output=True, check=True, timeout=30)
    assert done.stdout == b"a b\n${{ d }}\n"


def test_every_option_is_in_the_plan(make_record: Callable[..., JobRecord]) -> None:
    options = JobOptions(
        image="i:1", entrypoint="default", env={"A": "1"}, secrets={"T": "token"}, mounts=["/a:/b:ro"], gpus="2",
        memory="8GiB", cpus=1.5, network="none", timeout_s=90, retries=2,
    )  # fmt: skip
    record = make_record()
    plan = read_plan_text(plan_text(record, options), Path("/project/job.yaml")).plan
    (step,) = plan.steps
    assert step.params == {
        "command": "bash -c true", "project_id": "demo", "entrypoint": "default", "env": {"A": "1"}, "gpu": True,
        "mounts": ["/a:/b:ro"], "image": "i:1", "memory": "8GiB", "cpus": 1.5, "network": "none",
    }  # fmt: skip
    assert step.resources is not None and step.resources.gpus == 2 and step.secret_variables == {"T": "token"}
    assert step.retry is not None and (step.timeout_seconds, step.retry.max_attempts) == (90, 3)
    assert render(step.env, {}) == {"SYGALDRY_CONTAINER_ROOT": record.root}
    assert plan.log_dir == str(record.log_dir)


def test_hidden_values_are_named_in_the_plan_and_not_part_of_it(make_record: Callable[..., JobRecord]) -> None:
    options = JobOptions(secrets={"T": "token"}, hidden={"HF_TOKEN": "hf_0f9a7c"})
    text = plan_text(make_record(), options)
    (step,) = read_plan_text(text, Path("/project/job.yaml")).plan.steps
    assert step.secret_variables == {"T": "token", "HF_TOKEN": "HF_TOKEN"}
    assert "hf_0f9a7c" not in text + repr(options)


@pytest.mark.parametrize(
    "name", ["", ".", "../x", "a/b", "a b", "-a", "a\n", "ä", "a" * 81, "train-20261122-015829-468d"]
)
def test_a_name_that_could_be_another_file_is_refused(make_record: Callable[..., JobRecord], name: str) -> None:
    with pytest.raises(JobError, match="job"):
        make_record(name)


def test_a_word_that_no_plan_can_hold_is_refused(make_record: Callable[..., JobRecord]) -> None:
    with pytest.raises(JobError, match="not UTF-8"):
        make_record(command=["echo", os.fsdecode(b"\xff")])


def test_runs_are_listed_newest_first_and_what_is_no_record_is_passed_over(tmp_path: Path) -> None:
    env = {"XDG_STATE_HOME": str(tmp_path)}
    made = []
    for project, job in [("a", "x"), ("b", "x"), ("a", "x-2")]:
        made.append(new_record(job, project, ["true"], env))
        made[-1].write()
    (made[0].folder.parent / "other").mkdir()
    (made[0].folder.parent / "other" / "job.json").write_text("{")
    assert [root.name for root in known_roots(env)] == ["a", "b"]
    assert records(known_roots(env)) == made[::-1]


@pytest.mark.parametrize(
    ("kept", "line"),
    [
        (Kept("START", msg="start"), "START job=j ts=T"),
        (Kept("PROGRESS", msg="running"), "PROGRESS job=j ts=T msg=running"),
        (Kept("DONE", rc=0), "DONE job=j ts=T rc=0"),
        (Kept("FAILED", rc=3, msg="ended with exit code 3"), "FAILED job=j ts=T rc=3"),
        (Kept("STOPPED"), "STOPPED job=j ts=T"),
        (Kept("LOST", msg="nobody knows"), "LOST job=j ts=T"),
    ],
)
def test_the_status_line_keeps_the_familiar_grammar(kept: Kept, line: str) -> None:
    first, job, moment, *rest = status_line("j", kept).split(" ")
    assert " ".join([first, job, "ts=T", *rest]) == line
    time.strptime(moment, "ts=%Y-%m-%dT%H:%M:%S%z")


def test_the_files_follow_a_job_to_its_end(make_record: Callable[..., JobRecord]) -> None:
    record = make_record()
    files = JobFiles(record)
    files.begin()
    assert files.status.read_text().startswith(f"START job={record.job} ts=") and not files.pid.exists()
    assert files.newest_status.read_text() == files.status.read_text()
    attempts = Attempts(record)
    attempts.begin()
    attempts.print("one")
    assert files.catch_up(RUN_ID, is_running=True).state == "PROGRESS"
    assert files.raw_log.read_text() == "one\n" and files.pid.read_text() == f"{os.getpid()}\n"
    attempts.begin(**gone())
    attempts.print("two")
    files.catch_up(RUN_ID, is_running=True)
    assert files.pid.read_text() != f"{os.getpid()}\n"
    kept = files.conclude("FAILED", 3, "ended with exit code 3")
    assert not kept.goes_on and files.conclude("DONE", 0).state == "FAILED"
    assert files.catch_up(RUN_ID, is_running=True).state == "FAILED"
    assert files.status.read_text().endswith("rc=3\n") and files.raw_log.read_text() == "one\ntwo\n"
    assert events(files) == ["start", "progress", "progress", "failed"]


def test_a_new_run_is_what_the_name_shows_from_its_launch_on(make_record: Callable[..., JobRecord]) -> None:
    older, _ = begun(make_record())
    older.conclude("DONE", 0)
    newer = JobFiles(make_record())
    newer.begin()
    assert newer.newest_status.read_text().startswith("START ")
    newer.conclude("FAILED", 125, "not launched")
    older.catch_up(RUN_ID, is_running=False)
    assert newer.newest_status.read_text().startswith("FAILED ") and older.status.read_text().startswith("DONE ")


def test_a_heartbeat_is_written_when_it_is_due_and_not_before(make_record: Callable[..., JobRecord]) -> None:
    files, _ = begun(make_record(heartbeat_s=3600.0))
    assert files.catch_up(RUN_ID, is_running=True) == files.catch_up(RUN_ID, is_running=True)
    assert events(files) == ["start", "progress"]
    often, _ = begun(make_record("often", heartbeat_s=0.0))
    often.catch_up(RUN_ID, is_running=False)
    assert events(often) == ["start", "progress"]
    often.catch_up(RUN_ID, is_running=True)
    assert events(often) == ["start", "progress", "progress"]


def test_a_run_that_is_tried_again_starts_again(make_record: Callable[..., JobRecord]) -> None:
    files, attempts = begun(make_record())
    attempts.print("first")
    files.catch_up(RUN_ID, is_running=False)
    files.conclude("FAILED", 1, "failed")
    again = Attempts(files.record, "run-2")
    again.begin()
    again.print("second")
    assert files.catch_up("run-2", is_running=True).state == "PROGRESS"
    files.conclude("DONE", 0)
    assert files.raw_log.read_text() == "first\nsecond\n"
    assert events(files) == ["start", "progress", "failed", "start", "progress", "done"]


def test_who_is_found_to_run_after_all_is_not_lost(make_record: Callable[..., JobRecord]) -> None:
    files, attempts = begun(make_record())
    attempts.print("one")
    files.conclude("LOST")
    attempts.print("two")
    assert files.catch_up(RUN_ID, is_running=False).state == "LOST"
    assert files.catch_up(RUN_ID, is_running=True).state == "PROGRESS"
    assert files.raw_log.read_text() == attempts.expected


actions = st.one_of(
    st.tuples(st.just("print"), st.text(st.characters(codec="utf-8"), max_size=8), st.booleans()),
    st.sampled_from([("attempt",), ("look",), ("torn output",), ("torn event",), ("no status",), ("no log",)]),
)


@settings(max_examples=60, deadline=None)
@given(done=st.lists(actions, max_size=25))
def test_whatever_breaks_the_next_look_puts_it_right(
    tmp_path_factory: pytest.TempPathFactory, done: list[tuple[Any, ...]]
) -> None:
    env = {"SYGALDRY_CONTAINER_ROOT": str(tmp_path_factory.mktemp("root"))}
    files, attempts = begun(new_record("job", "demo", ["true"], env))
    for action, *details in done:
        if action == "print":
            attempts.print(*details)
        elif action == "attempt":
            attempts.begin()
        elif action == "look":
            files.catch_up(RUN_ID, is_running=False)
        elif action == "torn output":
            with files.raw_log.open("a") as log:
                log.write("written, but not yet counted")
        elif action == "torn event":
            with files.events.open("a") as file:
                file.write('{"ts": "20')
        elif action == "no status":
            files.status.unlink(missing_ok=True)
        else:
            files.raw_log.unlink(missing_ok=True)
    files.conclude("DONE", 0)
    files.catch_up(RUN_ID, is_running=False)
    assert files.raw_log.read_bytes().decode() == attempts.expected
    assert files.status.read_text().startswith("DONE ")
    assert events(files)[0] == "start" and events(files).count("done") == 1 and events(files)[-1] == "done"


class Handle:
    """A step on a node of its own: says where it is, and ends when it is let go."""

    def __init__(self) -> None:
        self.let_go = asyncio.Event()

    async def wait(self, on_progress: Callable[[Progress], None]) -> StepResult:
        on_progress(Progress(text="waiting for a node"))
        on_progress(Progress(node="there"))
        await self.let_go.wait()
        return StepResult(outcome="succeeded")

    async def cancel(self) -> StepResult:
        return StepResult(outcome="cancelled")


async def test_a_job_on_another_node_is_kept_up_by_what_its_worker_hears(
    make_record: Callable[..., JobRecord], step_request: Callable[..., Any]
) -> None:
    record, handle, heard = make_record(), Handle(), []
    JobFiles(record).begin()
    request = step_request(
        "job", "container_job", log_dir=str(record.log_dir), workflow_id=record.workflow_id, run_id=RUN_ID
    )

    async def attach() -> Handle:
        return handle

    async with kept(request, attach) as told:
        watched = await told()
        waiting = asyncio.create_task(watched.wait(heard.append))
        async with asyncio.timeout(60):
            while JobFiles(record).read().msg != "running":
                await asyncio.sleep(0.02)
        handle.let_go.set()
        assert (await waiting).outcome == "succeeded" and [progress.node for progress in heard] == ["", "there"]
        assert (await watched.cancel()).outcome == "cancelled"
    async with kept(step_request("other"), attach) as told:
        assert told is attach
    now = {"started_at": 1.0, "finished_at": 2.0, "duration_s": 1.0, "plan": "train"}
    step = StepReport(id="job", type="container_job", outcome="succeeded", exit_code=0)
    said = RunReport(workflow_id=record.workflow_id, run_id=RUN_ID, outcome="succeeded", steps=[step], **now)
    await conclude(Finish(report=said, log_dir=str(record.log_dir)))
    assert events(JobFiles(record)) == ["start", "progress", "done"]


@pytest.mark.parametrize(
    ("moment", "outcome"), [("attended", "cancelled"), ("worker stops", "failed"), ("before", "failed")]
)
async def test_sigterm_to_a_job_stops_it_unless_all_stops(
    moment: str, outcome: str, make_record: Callable[..., JobRecord], step_request: Callable[..., Any]
) -> None:
    record = make_record()
    JobFiles(record).begin()
    request = step_request(
        "job", "container_job", log_dir=str(record.log_dir), workflow_id=record.workflow_id, run_id=RUN_ID
    )
    told = StepResult(outcome="failed", reason="infrastructure", exit_code=TOLD_TO_END)
    folder = Attempts(record).begin()
    if moment == "before":
        (folder / RESULT).write_text(told.model_dump_json())
    environment = ActivityEnvironment()

    class Ended(Handle):
        async def wait(self, on_progress: Callable[[Progress], None]) -> StepResult:
            if moment == "worker stops":
                environment.worker_shutdown()
            return told

    async def attach() -> Handle:
        return Ended()

    async def attend() -> StepResult:
        async with kept(request, attach) as attach_to_job:
            return await (await attach_to_job()).wait(lambda progress: None)

    assert (await environment.run(attend)).outcome == outcome


def answering(**answers: Any) -> Callable[..., Any]:
    """A service that gives these answers by method; None does not know the run."""
    return lambda method, **arguments: answers[method]


def report(outcome: str, step: str, exit_code: int | None = None, error: str = "") -> dict[str, Any]:
    steps = [{"outcome": step, "exit_code": exit_code, "error": error, "reason": ""}]
    return {"run_id": RUN_ID, "outcome": outcome, "steps": steps}


@pytest.mark.parametrize(
    ("said", "state", "rc"),
    [
        (report("succeeded", "succeeded", 0), "DONE", 0),
        (report("failed", "failed", 7, "ended with exit code 7\n\nhint: x"), "FAILED", 7),
        (report("failed", "failed", None, "the image is not there"), "FAILED", 125),
        (report("failed", "timed_out", None, "not done after 1 s"), "FAILED", 124),
        (report("failed", "cancelled"), "STOPPED", None),
        (report("cancelled", "succeeded", 0), "STOPPED", None),
        ({"run_id": RUN_ID, "outcome": "cancelled", "steps": []}, "STOPPED", None),
    ],
)
def test_the_end_of_a_job_comes_from_the_report(
    make_record: Callable[..., JobRecord], said: dict[str, Any], state: str, rc: int | None
) -> None:
    files, _ = begun(make_record())
    kept = look(files.record, answering(find={"state": said["outcome"], "run_id": RUN_ID}, report=said))
    assert (kept.state, kept.rc) == (state, rc) and "\n" not in kept.msg
    assert look(files.record, answering()) == kept


def test_a_job_whose_run_nobody_knows_is_what_it_left_behind(make_record: Callable[..., JobRecord]) -> None:
    nobody = answering(find=None)
    runs, _ = begun(make_record("runs"))
    assert look(runs.record, nobody).state == "PROGRESS"
    ended, _ = begun(make_record("ended"), **gone())
    folder = ended.attempt_dir(ended.read())
    assert folder is not None
    (folder / RESULT).write_text(StepResult(outcome="failed", exit_code=5).model_dump_json())
    assert look(ended.record, nobody).rc == 5
    lost, _ = begun(make_record("lost"), **gone())
    assert look(lost.record, nobody).state == "LOST" and events(lost) == ["start", "progress", "lost"]


def test_a_job_is_not_lost_while_somebody_launches_it(make_record: Callable[..., JobRecord]) -> None:
    files, other = JobFiles(make_record()), JobFiles(make_record())
    files.begin()
    nobody = answering(find=None)
    with other.launching() as is_ours:
        assert is_ours and look(files.record, nobody).state == "START"
        with files.launching(wait_s=0) as is_ours_too:
            assert not is_ours_too
        assert look(files.record, nobody, is_launcher=True).state == "LOST"


def test_a_worker_that_told_nobody_its_run_is_found_by_the_logs(make_record: Callable[..., JobRecord]) -> None:
    files = JobFiles(make_record())
    files.begin()
    Attempts(files.record).begin()
    assert look(files.record, answering(find=None)).run_id == RUN_ID


@pytest.mark.parametrize("is_served", [True, False])
def test_health_judges_heartbeats_and_processes(make_record: Callable[..., JobRecord], is_served: bool) -> None:
    files, _ = begun(make_record("well"))
    kept = files.read()
    found = health(files.record, kept, is_served=is_served)
    assert (found.word, found.pid, found.limit_s) == ("running", os.getpid(), 90.0)
    kept.heartbeat_at -= 100
    found = health(files.record, kept, is_served=is_served)
    assert found.word == "stale" and "100 s" in found.reason
    assert health(files.record, kept, is_served=is_served, limit_s=200).word == "running"
    assert health(files.record, files.conclude("DONE", 0), is_served=is_served).word == "ended"


@pytest.mark.parametrize("host", [{"start_ticks": 1}, {"boot_id": "before"}], ids=["another process", "rebooted"])
def test_a_pid_that_another_process_has_by_now_is_not_the_job(
    make_record: Callable[..., JobRecord], host: dict[str, Any]
) -> None:
    files, _ = begun(make_record(), **host)
    assert health(files.record, files.read(), is_served=False).word == "stale"
    # Its worker will see that within a second, and try again.
    assert health(files.record, files.read(), is_served=True).word == "running"


def test_a_job_without_a_process_of_its_own_has_no_pid(make_record: Callable[..., JobRecord]) -> None:
    waits = JobFiles(make_record("waits"))
    waits.begin()
    on_ray, _ = begun(make_record("ray"), isolated=False)
    for files in (waits, on_ray):
        found = health(files.record, files.read(), is_served=True)
        assert (found.word, found.pid) == ("running", None) and not files.pid.exists()
