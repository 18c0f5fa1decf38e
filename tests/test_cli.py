"""The `orchestrate` command: against a scripted gateway, and end to end with the real services."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import socketserver
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyte
import pytest

from bridge.cli.connection import LocalConnection, RemoteConnection, connect
from bridge.cli.failure import Failure
from bridge.cli.main import GROUPS, main
from bridge.records import append_event, new_event, run_dir
from bridge.report import AttemptReport, RunProgress, RunReport, RunSummary, StepReport, StepState
from bridge.state import State

ORCHESTRATE = str(Path(sys.executable).with_name("orchestrate"))
OURS = ("ORCHESTRATE_HOME", "TEMPORAL_ADDRESS", "TEMPORAL_NAMESPACE", "TEMPORAL_TASK_QUEUE", "TEMPORAL_LOG_DIR")
HANG_UP = object()
"""An answer: the connection is closed instead."""


class ScriptedGateway:
    """Answers on the gateway's socket as told: per method a list of answers, the last one again and again."""

    def __init__(self, path: Path) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, list[Any]] = {}
        gateway = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                for line in self.rfile:
                    answer = gateway.answer(json.loads(line))
                    if answer is HANG_UP:
                        return
                    self.wfile.write(json.dumps(answer).encode() + b"\n")

        class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True

        self.server = Server(str(path), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def script(self, method: str, *answers: Any) -> None:
        """Set the answers of one method: results, or `error(...)`."""
        self.answers[method] = list(answers)

    def answer(self, request: dict[str, Any]) -> Any:
        self.calls.append((request["method"], request["arguments"]))
        answers = self.answers[request["method"]]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer is HANG_UP or (isinstance(answer, dict) and "error" in answer and "kind" in answer["error"]):
            return answer
        return {"result": answer}

    def arguments(self, method: str) -> list[dict[str, Any]]:
        """The arguments of each call of a method."""
        return [arguments for called, arguments in self.calls if called == method]


def error(kind: str, message: str, **more: Any) -> dict[str, Any]:
    return {"error": {"kind": kind, "message": message, **more}}


def progress(*steps: StepState, state: Any = "running", sequence: int = 1, log_dir: str = "/logs") -> dict[str, Any]:
    return RunProgress(
        workflow_id="flow-1",
        run_id="run-1",
        plan="demo",
        state=state,
        started_at=time.time(),
        sequence=sequence,
        total=max(1, len(steps)),
        counts={},
        log_dir=log_dir,
        steps=list(steps),
    ).model_dump(mode="json")


def report(outcome: Any = "succeeded", **step: Any) -> dict[str, Any]:
    attempts = [AttemptReport(number=1, outcome=outcome)]
    fields = {"id": "hello", "outcome": outcome, "attempts": attempts, "started_at": 1.0, "duration_s": 0.5, **step}
    return RunReport(
        workflow_id="flow-1",
        run_id="run-1",
        plan="demo",
        outcome=outcome,
        started_at=1.0,
        finished_at=2.0,
        duration_s=1.0,
        log_dir="/logs",
        steps=[StepReport(**fields)],
    ).model_dump(mode="json")


def summary(workflow_id: str, run_id: str = "run-1", state: Any = "succeeded") -> dict[str, Any]:
    return RunSummary(
        workflow_id=workflow_id, run_id=run_id, plan="demo", state=state, started_at=1.0, finished_at=2.0
    ).model_dump(mode="json")


STARTED = {"workflow_id": "flow-1", "run_id": "run-1", "plan": "demo", "log_dir": "/logs", "warnings": []}


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    """A state directory of the test's own, and no setting from outside."""
    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return State(tmp_path / "home").create()


@pytest.fixture
def gateway(clean: State) -> Iterator[ScriptedGateway]:
    """A gateway where a run of one step succeeds."""
    gateway = ScriptedGateway(clean.gateway_socket)
    gateway.script("submit", STARTED)
    gateway.script("progress", progress(StepState(id="hello", state="succeeded", attempt=1), state="succeeded"))
    gateway.script("report", report())
    gateway.script("runs", [summary("flow-1")])
    yield gateway
    gateway.server.shutdown()
    gateway.server.server_close()


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan file."""
    path = tmp_path / "hello.yaml"
    path.write_text("steps:\n  - {id: hello, type: command, command: echo, args: [hello world]}\n")
    return path


def test_a_plan_runs_to_its_end(gateway: ScriptedGateway, plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    running = StepState(id="hello", state="running", attempt=1, started_at=time.time())
    done = StepState(id="hello", state="succeeded", attempt=1, started_at=1.0, duration_s=0.5)
    gateway.script("progress", progress(running), progress(done, state="succeeded", sequence=2))
    assert main([str(plan)]) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[0] == "plan `demo` runs as flow-1"
    assert re.fullmatch(r"\d\d:\d\d:\d\d hello running", lines[1])
    assert re.fullmatch(r"\d\d:\d\d:\d\d hello succeeded 0\.50s", lines[2])
    assert lines[-1] == "plan `demo` ✓ succeeded in 1.00s (1 succeeded)"
    assert output.err == ""
    assert [call["since"] for call in gateway.arguments("progress")] == [0, 1]
    assert gateway.arguments("submit")[0]["text"] == plan.read_text()


@pytest.mark.parametrize(("outcome", "code"), [("succeeded", 0), ("failed", 1), ("cancelled", 130), ("timed_out", 1)])
def test_exit_code_of_each_outcome(gateway: ScriptedGateway, plan: Path, outcome: str, code: int) -> None:
    gateway.script("progress", progress(state=outcome))
    gateway.script("report", report(outcome))
    assert main(["run", str(plan), "--quiet"]) == code


def test_json_is_alone_on_stdout(gateway: ScriptedGateway, plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = report("failed", stdout_tail="\x9b2Jgrün")
    gateway.script("submit", {**STARTED, "warnings": ["hello.yaml:1:1: warning: odd"]})
    gateway.script("report", document)
    assert main([str(plan), "--json"]) == 1
    output = capsys.readouterr()
    assert json.loads(output.out) == document
    assert "grün" in output.out and "\x9b" not in output.out
    assert "hello succeeded" in output.err and "warning: odd" in output.err


def test_quiet_shows_only_a_failure(gateway: ScriptedGateway, plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(plan), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    gateway.script("report", report("failed", error="exit code 3"))
    assert main([str(plan), "--quiet"]) == 1
    output = capsys.readouterr()
    assert output.out == "" and "exit code 3" in output.err


def test_a_detached_run_is_left_alone(gateway: ScriptedGateway, plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(plan), "--detach", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == STARTED
    assert [method for method, _ in gateway.calls] == ["submit"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["{plan}", "--workflow-id", "w", "--log-dir", "logs", "-p", "a=1", "-p", "b=x=y"],
        ["-p", "a=1", "--param", "b=x=y", "--workflow-id=w", "--log-dir=logs", "--plan", "{plan}"],
        ["-plan", "{plan}", "-workflow-id", "w", "-log-dir", "logs", "-pa=1", "-pb=x=y"],
        ["run", "-plan={plan}", "-workflow-id=w", "-log-dir=logs", "-p", "@params.json"],
        ["run", "{plan}", "--workflow-id", "w", "--log-dir", "logs", "--params", "params.json", "-p", "a=1"],
    ],
)
def test_every_spelling_asks_for_the_same(
    gateway: ScriptedGateway, plan: Path, tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "params.json").write_text('{"a": 1, "b": "x=y"}')
    assert main([argument.format(plan=plan) for argument in arguments]) == 0
    (asked,) = gateway.arguments("submit")
    assert asked == {
        "text": plan.read_text(),
        "path": str(plan),
        "given": {"a": "1", "b": "x=y"},
        "workflow_id": "w",
        "log_dir": str(tmp_path / "logs"),
        "format": "yaml",
    }


def test_the_old_list_of_steps(gateway: ScriptedGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "steps.json").write_text("[]")
    monkeypatch.setenv("TEMPORAL_LOG_DIR", "from-environment")
    assert main(["run", "-input", "steps.json"]) == 0
    (asked,) = gateway.arguments("submit")
    assert (asked["format"], asked["text"]) == ("json", "[]")
    assert (asked["log_dir"], asked["default_log_dir"]) == (None, str(tmp_path / "from-environment"))
    assert re.fullmatch(r"steps-\d{8}-\d{6}-[0-9a-f]{4}", asked["workflow_id"])
    assert main(["steps.json"]) == 0
    assert [asked["format"] for asked in gateway.arguments("submit")] == ["json", "json"]


def test_every_problem_of_a_plan_is_shown(
    gateway: ScriptedGateway, plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.script("submit", error("PlanError", "hello.yaml:1:1: error: one\nhello.yaml:2:1: error: two", problems=[]))
    assert main([str(plan)]) == 2
    output = capsys.readouterr()
    assert output.out == "" and "error: one" in output.err and "error: two" in output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hallo.yaml"], "did you mean `hello.yaml`?"),
        (["stauts"], "did you mean `status`?"),
        (["run"], "wanted one"),
        (["hello.yaml", "-p", "novalue"], "wanted `NAME=VALUE`"),
        (["hello.yaml", "--params", "nowhere.json"], "cannot read params"),
        (["hello.yaml", "--params", "hello.yaml"], "not valid JSON"),
        (["hello.yaml", "--bogus"], "orchestrate run --help"),
        (["show", "flaw-1"], "did you mean `flow-1`?"),
        (["."], "cannot read plan"),
        (["logs", "tail"], "needs `--workflow-id`"),
    ],
)
def test_usage_errors_say_what_was_wanted(
    gateway: ScriptedGateway, plan: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    gateway.script("progress", error("RunNotFound", "there is no run"))
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert message in output.err and "Traceback" not in output.err and output.out == ""


def test_a_lost_connection_is_taken_up_again(
    gateway: ScriptedGateway, plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running = progress(StepState(id="hello", state="running", attempt=1), sequence=7)
    gateway.script("progress", running, HANG_UP, HANG_UP, error("RPCError", "unavailable"), progress(state="succeeded"))
    assert main([str(plan)]) == 0
    assert [call["since"] for call in gateway.arguments("progress")] == [0, 7, 7, 7, 7]
    assert capsys.readouterr().out.count("hello running") == 1


def test_a_plan_is_started_once_when_the_answer_is_lost(gateway: ScriptedGateway, plan: Path) -> None:
    gateway.script("submit", HANG_UP, error("RunConflict", "goes on"))
    gateway.script("progress", progress(), progress(state="succeeded"))
    assert main([str(plan)]) == 0
    first, second = gateway.arguments("submit")
    assert first["workflow_id"] == second["workflow_id"] == gateway.arguments("progress")[0]["workflow_id"]


def test_a_retry_is_not_repeated_when_the_answer_is_lost(
    gateway: ScriptedGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.script("retry", HANG_UP)
    assert main(["retry", "last"]) == 3
    assert "`orchestrate runs` shows" in capsys.readouterr().err
    assert len(gateway.arguments("retry")) == 1


def test_a_conflict_is_an_error(gateway: ScriptedGateway, plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.script("submit", error("RunConflict", "a run with workflow id `w` goes on"))
    assert main([str(plan), "--workflow-id", "w"]) == 2
    assert "goes on" in capsys.readouterr().err


def test_secrets_of_the_environment_are_handed_over(
    gateway: ScriptedGateway, plan: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = error("SecretsNeeded", "secrets are missing", names=["MY_TOKEN"])
    gateway.script("submit", needed, STARTED)
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    assert main([str(plan)]) == 0
    first, second = gateway.arguments("submit")
    assert "secrets" not in first and second["secrets"] == {"MY_TOKEN": "s3cret"}
    assert first["workflow_id"] == second["workflow_id"]
    monkeypatch.delenv("MY_TOKEN")
    gateway.script("submit", needed)
    assert main([str(plan)]) == 2
    assert "orchestrate secret set MY_TOKEN" in capsys.readouterr().err


def test_what_the_environment_lacks_is_said_too(
    gateway: ScriptedGateway, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.script("submit", error("SecretsNeeded", "secrets are missing", names=["MY_TOKEN", "STORED"]), STARTED)
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    monkeypatch.delenv("STORED", raising=False)
    assert main([str(plan)]) == 0
    assert gateway.arguments("submit")[1]["secrets"] == {"MY_TOKEN": "s3cret", "STORED": None}


def test_the_ray_that_the_shell_means_is_told(
    gateway: ScriptedGateway, plan: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    gateway.script("submit", {**STARTED, "warnings": ["warning: RAY_ADDRESS is another"]})
    assert main([str(plan)]) == 0
    assert gateway.arguments("submit")[0]["ray_address"] == "10.0.0.1:6379"
    assert "RAY_ADDRESS is another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("last", ("nightly-2", "aaa-2")),
        ("nightly-1", ("nightly-1", "ccc")),
        ("aaa-1", ("nightly-2", "aaa-1")),
        ("week", ("weekly", "ddd")),
        ("cc", ("nightly-1", "ccc")),
    ],
)
def test_a_run_is_named_by_what_is_unique(gateway: ScriptedGateway, text: str, found: tuple[str, str]) -> None:
    rows = [("nightly-2", "aaa-2"), ("nightly-2", "aaa-1"), ("nightly-1", "ccc"), ("weekly", "ddd")]
    gateway.script("runs", [summary(*row) for row in rows])
    assert main(["show", text]) == 0
    (asked,) = gateway.arguments("report")
    assert (asked["workflow_id"], asked["run_id"]) == found


def test_a_name_that_may_be_several_runs(gateway: ScriptedGateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.script("runs", [summary("nightly-2"), summary("nightly-1")])
    assert main(["cancel", "night"]) == 2
    assert "`nightly-2`, `nightly-1`" in capsys.readouterr().err
    assert gateway.arguments("cancel") == []


def test_the_list_of_runs(gateway: ScriptedGateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["STATE", "RUN", "PLAN", "STARTED", "DURATION", "RUN", "ID"]
    assert row.split()[:3] == ["succeeded", "flow-1", "demo"]
    assert main(["runs", "--json", "--limit", "3"]) == 0
    assert json.loads(capsys.readouterr().out) == [summary("flow-1")]
    assert gateway.arguments("runs")[-1] == {"limit": 3}


def test_a_run_that_goes_on_is_shown_whole(gateway: ScriptedGateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.script("runs", [summary("flow-1", state="running")])
    gateway.script("progress", progress(StepState(id="train", state="running", attempt=1, started_at=time.time())))
    gateway.script("report", {**report(), "outcome": "not_run"})
    assert main(["show", "last", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["outcome"] == "running"
    assert [(step["id"], step["outcome"]) for step in document["steps"]] == [
        ("hello", "succeeded"),
        ("train", "running"),
    ]
    assert document["steps"][0].keys() == document["steps"][1].keys()


def test_a_run_is_asked_to_cancel(gateway: ScriptedGateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.script("runs", [summary("flow-1", state="running")])
    gateway.script("cancel", None)
    assert main(["cancel", "flow-1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cancel_requested"] is True
    gateway.script("runs", [summary("flow-1")])
    assert main(["cancel", "flow-1"]) == 0
    assert "already ended" in capsys.readouterr().out
    assert len(gateway.arguments("cancel")) == 1


def test_why_a_cached_step_runs_again(gateway: ScriptedGateway, plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.script("explain", [{"field": "params.args", "before": "a", "now": "b"}])
    assert main(["explain", str(plan), "hello", "-p", "x=1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["params.args", "a", "b"]
    assert gateway.arguments("explain")[0]["given"] == {"x": "1"}


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A log root with a run that is over: two attempts of one step, one of another."""
    root = tmp_path / "recorded"
    folder = run_dir(root, "flow-1", "run-1")

    def event(status: Any, step_id: str = "", attempt: int = 0, **fields: Any) -> None:
        append_event(folder, new_event("flow-1", "run-1", status=status, step_id=step_id, attempt=attempt, **fields))

    def lines(step_id: str, attempt: int, *records: tuple[str, str, bool]) -> None:
        attempt_dir = folder / step_id / f"attempt-{attempt}"
        attempt_dir.mkdir(parents=True)
        texts = [
            json.dumps(
                {"stepId": step_id, "attempt": attempt, "stream": stream, "message": message, "partial": partial}
            )
            for stream, message, partial in records
        ]
        (attempt_dir / "structured.jsonl").write_text("".join(text + "\n" for text in texts))

    event("run_started", message="demo")
    event("step_started", "build", 1)
    lines("build", 1, ("stdout", "first\x1b[2J", False), ("stderr", "oops", False))
    event("step_started", "test", 1)
    lines("test", 1, ("stdout", "be", True), ("stdout", "gun", False), ("stdout", "end", True))
    event("step_retry", "build", 2)
    lines("build", 2, ("stdout", "second", False))
    event("step_finished", "test", 1, exit_code=1, duration_s=2.0, message="failed")
    event("step_finished", "build", 2, message="succeeded")
    event("run_finished", message="failed")
    return root


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ([], ["build | first", "build | oops", "test | begun", "test | end", "build#2 | second"]),
        (["-f"], ["build | first", "build | oops", "test | begun", "test | end", "build#2 | second"]),
        (["--step", "build"], ["first", "oops", "#2 | second"]),
        (["--step", "build", "--attempt", "2"], ["second"]),
        (["--stream", "stderr"], ["build | oops"]),
        (["--lines", "1"], ["build#2 | second"]),
        (["--step", "test", "--follow"], ["begun", "end"]),
    ],
)
def test_logs_without_any_service(
    clean: State, recorded: Path, capsys: pytest.CaptureFixture[str], options: list[str], shown: list[str]
) -> None:
    assert main(["logs", "last", "--log-dir", str(recorded), *options]) == 0
    assert capsys.readouterr().out.splitlines() == shown


def test_logs_as_json_lines(clean: State, recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", "flow", "--log-dir", str(recorded), "--json", "--step", "build", "--attempt", "1"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["message"] for record in records] == ["first\x1b[2J", "oops"]


def test_logs_of_what_is_not_there(clean: State, recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", "flow-1", "--log-dir", str(recorded), "--step", "biuld"]) == 2
    assert "did you mean `build`?" in capsys.readouterr().err
    (report,) = recorded.glob("flow-1/*/events.jsonl")
    step = {"id": "kept", "stdout_path": "/runs/before/stdout.log"}
    report.with_name("report.json").write_text(json.dumps({"steps": [step]}))
    assert main(["logs", "flow-1", "--log-dir", str(recorded), "--step", "kept"]) == 2
    assert "hint: its log is `/runs/before/stdout.log`" in capsys.readouterr().err
    assert main(["logs", "flaw-1", "--log-dir", str(recorded)]) == 2
    assert "did you mean `flow-1`?" in capsys.readouterr().err
    assert main(["logs", "last", "--log-dir", str(recorded / "flow-1")]) == 2


def test_logs_of_a_run_that_the_service_knows(
    gateway: ScriptedGateway, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.script("progress", progress(state="failed", log_dir=str(recorded)))
    assert main(["logs", "last", "-f", "--step", "test"]) == 0
    assert capsys.readouterr().out == "begun\nend\n"


def test_the_verbs_of_the_old_logs_command(
    clean: State, recorded: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["--workflow-id", "flow-1", "--run-id", "run-1"]
    assert main(["logs", "--log-dir", str(recorded), "list-runs"]) == 0
    assert re.fullmatch(r"flow-1\trun-1\t\S+Z\tdemo\tfailed\t2/2\n", capsys.readouterr().out)
    monkeypatch.setenv("TEMPORAL_LOG_DIR", str(recorded))
    assert main(["logs", "show-steps", *run]) == 0
    build, test = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert build[:4] == ["build", "finished", "0", "0.0"] and build[7:] == ["build", "2", "succeeded"]
    assert test[:4] == ["test", "finished", "1", "2.0"]
    assert main(["logs", "tail", *run]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["status"] for event in events][:3] == ["run_started", "step_started", "step_started"]
    assert len(events) == 7
    assert main(["logs", "follow", *run]) == 0
    assert capsys.readouterr().out == ""
    assert main(["logs", "list-runs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == "failed"


def test_a_step_that_is_tried_again_is_started_again(
    clean: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_dir(tmp_path, "flow", "run")
    for status, attempt in (("step_started", 1), ("step_finished", 1), ("step_retry", 2)):
        append_event(folder, new_event("flow", "run", status=status, step_id="a", attempt=attempt))  # type: ignore[arg-type]
    assert main(["logs", "show-steps", "--log-dir", str(tmp_path), "--workflow-id", "flow", "--run-id", "run"]) == 0
    assert capsys.readouterr().out.split("\t")[1] == "started"


def test_the_table_of_commands_holds() -> None:
    import importlib

    for module, names in GROUPS.items():
        assert [command.name for command in importlib.import_module(module).COMMANDS] == list(names)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", shown, re.MULTILINE) for names in GROUPS.values() for name in names)
    assert main(["--version"]) == 0
    assert re.fullmatch(r"orchestrate \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "blocked"),
    [
        (["hello.yaml"], {"temporalio", "pydantic", "yaml", "rich", "asyncio", "ray", "docker"}),
        (["--help"], {"temporalio", "ray", "docker", "torch", "rich"}),
    ],
)
def test_what_is_not_imported(gateway: ScriptedGateway, plan: Path, arguments: list[str], blocked: set[str]) -> None:
    program = (
        "import sys; from bridge.cli.main import main; code = main(sys.argv[1:]);"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert set(done.stderr.split()) & blocked == set()


def test_an_unexpected_error_is_one_message(
    gateway: ScriptedGateway, plan: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.script("submit", {"unexpected": True})
    assert main([str(plan)]) == 3
    shown = capsys.readouterr().err
    assert "unexpected KeyError" in shown and "ORCHESTRATE_DEBUG" in shown and "Traceback" not in shown
    monkeypatch.setenv("ORCHESTRATE_DEBUG", "1")
    assert main([str(plan)]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_an_invalid_plan_starts_no_service(clean: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text("steps:\n  - {id: a, type: comand}\n  - {id: a, type: command}\n")
    assert main(["bad.yaml"]) == 2
    shown = capsys.readouterr().err
    assert "bad.yaml:2:" in shown and "did you mean `command`?" in shown and "bad.yaml:3:" in shown
    assert not clean.services_file.exists() and not clean.supervisor_socket.exists()


@pytest.mark.parametrize(
    ("profile", "remote"), [("[profile.default]\naddress = 'h:1'", True), ("[profile.default]\nnamespace = 'n'", False)]
)
def test_an_address_of_temporals_own_configuration_counts(
    clean: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str, remote: bool
) -> None:
    (tmp_path / "temporal.toml").write_text(profile)
    monkeypatch.setenv("TEMPORAL_CONFIG_FILE", str(tmp_path / "temporal.toml"))
    assert isinstance(connect(None, None, None), RemoteConnection if remote else LocalConnection)
    assert isinstance(connect("h:2", None, None), RemoteConnection)
    (tmp_path / "temporal.toml").write_text("no toml")
    with pytest.raises(Failure, match="not valid TOML"):
        connect(None, None, None)


def test_a_temporal_that_does_not_answer(clean: State, plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(plan), "--address", "127.0.0.1:1"]) == 3
    shown = capsys.readouterr().err
    assert shown.startswith("error: cannot reach Temporal at `127.0.0.1:1`") and "Traceback" not in shown
    assert not clean.services_file.exists()


class Home:
    """Real services in a state directory of their own, used through the real command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        inherited = {name: value for name, value in os.environ.items() if name not in OURS}
        self.environment = {**inherited, "ORCHESTRATE_HOME": str(folder / "home"), "TERM": "xterm-256color"}

    def plan(self, name: str, *steps: str) -> Path:
        """A plan file with these steps."""
        path = self.folder / f"{name}.yaml"
        path.write_text("".join(["steps:\n", *(f"  - {step}\n" for step in steps)]))
        return path

    def run(self, *arguments: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
        """`orchestrate` with these arguments, to its end."""
        return subprocess.run(
            [ORCHESTRATE, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=self.folder,
            env={**self.environment, **environment},
        )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """Real services, ended when the module is done."""
    home = Home(tmp_path_factory.mktemp("cli"))
    yield home
    assert home.run("down").returncode == 0


HELLO = "{id: hello, type: command, command: echo, args: [hello world]}"
GATE = "echo waiting; until [ -e gate ]; do sleep 0.05; done; echo open"
GATED = f"{{id: gated, type: command, command: bash, args: [-c, '{GATE}']}}"


@pytest.mark.temporal
def test_a_real_plan_from_the_shell(home: Home) -> None:
    done = home.run(home.plan("hello", HELLO))
    assert done.returncode == 0, done.stderr
    assert "hello world" in done.stdout and done.stdout.splitlines()[-1].startswith("plan `hello` ✓ succeeded in ")
    document = json.loads(home.run("show", "last", "--json").stdout)
    step = document["steps"][0]
    assert (document["outcome"], step["outcome"], step["exit_code"]) == ("succeeded", "succeeded", 0)
    assert step["stdout_tail"] == "hello world\n" and Path(step["stdout_path"]).read_text() == "hello world\n"
    assert home.run("logs", "last").stdout == "hello | hello world\n"


@pytest.mark.temporal
def test_a_real_failure(home: Home) -> None:
    plan = home.plan(
        "failing",
        "{id: bad, type: command, command: bash, args: [-c, 'echo why >&2; exit 3']}",
        "{id: after, type: command, command: 'true', depends_on: [bad]}",
    )
    done = home.run(plan, "--json")
    assert done.returncode == 1, done.stderr
    bad, after = json.loads(done.stdout)["steps"]
    assert (bad["outcome"], bad["exit_code"], bad["stderr_tail"]) == ("failed", 3, "why\n")
    assert after["outcome"] == "skipped"
    shown = home.run("show", "last").stdout
    assert "--- bad stderr\nwhy\n" in shown
    retried = home.run("retry", "last", "--quiet")
    assert retried.returncode == 1 and retried.stdout == "" and "exit code 3" in retried.stderr


@pytest.mark.temporal
def test_where_logs_go(home: Home) -> None:
    plan = home.plan("logged", HELLO)
    planned = home.folder / "planned.yaml"
    planned.write_text("log_dir: from-plan\n" + plan.read_text())
    for arguments, environment, expected in (
        ([planned, "--log-dir", "from-flag"], {"TEMPORAL_LOG_DIR": "from-environment"}, "from-flag"),
        ([planned], {"TEMPORAL_LOG_DIR": "from-environment"}, "from-plan"),
        ([plan], {"TEMPORAL_LOG_DIR": "from-environment"}, "from-environment"),
        ([plan], {}, "home/runs"),
    ):
        document = json.loads(home.run(*arguments, "--json", **environment).stdout)
        assert document["log_dir"] == str(home.folder / expected)
    assert home.run("logs", "last", "--log-dir", "from-plan").stdout == "hello | hello world\n"


@pytest.mark.temporal
def test_a_detached_run_is_attached_to(home: Home) -> None:
    (home.folder / "gate").unlink(missing_ok=True)
    plan = home.plan("gated", GATED)
    started = json.loads(home.run(plan, "--detach", "--json", "--workflow-id", "gated-1").stdout)
    assert started["workflow_id"] == "gated-1"
    assert home.run(plan, "--workflow-id", "gated-1").returncode == 2
    follower = subprocess.Popen(
        [ORCHESTRATE, "logs", "gated-1", "-f"], stdout=subprocess.PIPE, text=True, cwd=home.folder, env=home.environment
    )
    assert follower.stdout is not None and follower.stdout.readline() == "gated | waiting\n"
    assert json.loads(home.run("show", "gated-1", "--json").stdout)["outcome"] == "running"
    (home.folder / "gate").touch()
    attached = home.run("attach", "gated-1")
    assert attached.returncode == 0 and "plan `gated` ✓ succeeded" in attached.stdout
    assert follower.communicate(timeout=30)[0] == "gated | open\n" and follower.returncode == 0


@pytest.mark.temporal
def test_a_killed_worker_is_not_noticed(home: Home) -> None:
    (home.folder / "gate").unlink(missing_ok=True)
    watcher = subprocess.Popen(
        [ORCHESTRATE, home.plan("gated", GATED)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=home.folder,
        env=home.environment,
    )
    assert watcher.stdout is not None
    assert any("gated running" in line for line in watcher.stdout)
    processes = json.loads(home.run("status", "--json").stdout)["processes"]
    os.kill(next(process["pid"] for process in processes if process["name"] == "worker"), signal.SIGKILL)
    (home.folder / "gate").touch()
    shown, _ = watcher.communicate(timeout=60)
    assert watcher.returncode == 0, shown
    assert home.run("logs", "last").stdout == "gated | waiting\ngated | open\n"


class Terminal:
    """`orchestrate` on a pseudo-terminal."""

    def __init__(self, home: Home, *arguments: str | Path) -> None:
        self._screen = pyte.Screen(100, 24)
        self._stream = pyte.ByteStream(self._screen)
        self._reader, writer = pty.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        # A session of its own with the terminal in control, so that Ctrl-C is a real one.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _ON_TERMINAL, ORCHESTRATE, *map(str, arguments)],
            stdin=writer,
            stdout=writer,
            stderr=writer,
            cwd=home.folder,
            env=home.environment,
            start_new_session=True,
        )
        os.close(writer)

    def wait_for(self, text: str, timeout_s: float = 60) -> str:
        """Wait until the screen shows a text; the whole screen."""
        deadline = time.monotonic() + timeout_s
        while text not in self.text():
            assert time.monotonic() < deadline and self._read(), f"`{text}` not shown, but\n{self.text()}"
        return self.text()

    def press_ctrl_c(self) -> None:
        """The key."""
        os.write(self._reader, b"\x03")

    def terminate(self) -> None:
        """SIGTERM to the command."""
        self._process.terminate()

    @property
    def cursor_is_shown(self) -> bool:
        """Whether the terminal shows its cursor."""
        return not self._screen.cursor.hidden

    def end(self) -> tuple[int, str]:
        """Wait for the end; exit code and screen."""
        while self._read():
            pass
        code = self._process.wait(60)
        os.close(self._reader)
        return code, self.text()

    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    def _read(self) -> bool:
        if select.select([self._reader], [], [], 1.0)[0]:
            try:
                self._stream.feed(os.read(self._reader, 65536))
            except OSError:
                return False
        return True


_ON_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.temporal
@pytest.mark.parametrize("remote", [False, True])
def test_ctrl_c_cancels_a_run(home: Home, remote: bool) -> None:
    home.run("up")
    (home.folder / "gate").unlink(missing_ok=True)
    address = json.loads(home.run("status", "--json").stdout)["temporal"]["address"]
    terminal = Terminal(home, home.plan("gated", GATED), *(["--address", address] if remote else []))
    shown = terminal.wait_for("waiting")
    assert re.search(r"^▸ gated +running ", shown, re.MULTILINE)
    terminal.press_ctrl_c()
    code, shown = terminal.end()
    assert code == 130
    assert "asking the run to cancel" in shown and "plan `gated` ■ cancelled" in shown
    assert "▸" not in shown


@pytest.mark.temporal
def test_another_temporal_is_used_by_its_address(home: Home) -> None:
    home.run("up")
    address = json.loads(home.run("status", "--json").stdout)["temporal"]["address"]
    elsewhere = {"ORCHESTRATE_HOME": str(home.folder / "elsewhere"), "TEMPORAL_ADDRESS": address}
    done = home.run(home.plan("remote", HELLO), "--json", **elsewhere)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["steps"][0]["stdout_tail"] == "hello world\n"
    assert home.run("logs", "last", **elsewhere).stdout == "hello | hello world\n"
    assert json.loads(home.run("show", document["workflow_id"], "--json").stdout) == document
    assert not State(home.folder / "elsewhere").services_file.exists()


@pytest.mark.temporal
def test_a_killed_watcher_leaves_the_terminal_in_order(home: Home) -> None:
    (home.folder / "gate").unlink(missing_ok=True)
    terminal = Terminal(home, home.plan("gated", GATED), "--workflow-id", "left-alone")
    terminal.wait_for("waiting")
    terminal.terminate()
    code, shown = terminal.end()
    assert code == 128 + signal.SIGTERM
    assert terminal.cursor_is_shown and "▸" not in shown
    (home.folder / "gate").touch()
    assert home.run("attach", "left-alone").returncode == 0


@pytest.mark.temporal
def test_ctrl_c_twice_lets_go_of_a_run(home: Home) -> None:
    (home.folder / "gate").unlink(missing_ok=True)
    # A step that takes its time to end, so that the second Ctrl-C comes before the run is over.
    script = 'trap "sleep 3; exit" TERM; echo ready; sleep 60 & wait'
    step = f"{{id: slow, type: command, command: bash, args: [-c, '{script}']}}"
    terminal = Terminal(home, home.plan("slow", step))
    terminal.wait_for("ready")
    terminal.press_ctrl_c()
    terminal.wait_for("asking the run to cancel")
    terminal.press_ctrl_c()
    code, shown = terminal.end()
    assert code == 130
    workflow_id = re.findall(r"pick it up with: orchestrate attach (\S+)", shown)[0]
    assert home.run("attach", workflow_id).returncode == 130
