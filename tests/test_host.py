"""How an attempt ends, whatever its code does: in a process of its own, and in a thread of a process that lives on."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from steps import StepRequest, StepResult
from steps._files import CANCEL, HOST, OUTPUTS, PROGRESS, REQUEST, attempt_dir, read_json, read_result
from steps._host import LARGEST_OUTPUTS, AlreadyStarted, Host
from steps._process import TOLD_TO_END, descendants

Make = Callable[..., StepRequest]
Run = Callable[..., Awaitable[StepResult]]


@pytest.fixture
def code(tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """Writes a function `run(context)` into the plan's folder; the fields of a step that calls it."""

    def write(body: str) -> dict[str, Any]:
        lines = "".join(f"    {line}\n" for line in body.strip("\n").split("\n"))
        imports = "import contextlib, ctypes, json, os, pathlib, signal, subprocess, sys, threading, time\n"
        steps = "from steps import StepCancelled, StepError, StepFailed\n"
        (tmp_path / "code_of_step.py").write_text(f"{imports}{steps}def run(context):\n{lines}")
        return {"type": "python", "params": {"call": "code_of_step:run"}}

    return write


def log(request: StepRequest, stream: str = "stdout") -> str:
    return (attempt_dir(request) / f"{stream}.log").read_text()


ENDINGS = [
    ("return {'a': 1}", "succeeded", "", 0, ""),
    ("return 3", "succeeded", "", 0, ""),
    ("sys.exit()", "succeeded", "", 0, ""),
    ("sys.exit(0)", "succeeded", "", 0, ""),
    ("sys.exit(3)", "failed", "exit_code", 3, "exited with code 3"),
    ("sys.exit('no luck')", "failed", "exit_code", 1, "exited with code 1"),
    ("raise ValueError('odd')", "failed", "error", None, "ValueError: odd"),
    ("raise KeyboardInterrupt", "failed", "error", None, "KeyboardInterrupt"),
    ("raise GeneratorExit", "failed", "error", None, "GeneratorExit"),
    ("raise StepFailed('later', 4)", "failed", "exit_code", 4, "later"),
    ("raise StepFailed('later')", "failed", "error", None, "later"),
    ("raise StepError('never')", "failed", "error", None, "never"),
    ("raise ValueError(chr(0xd800))", "failed", "error", None, "ValueError"),
    ("return {'a': {1, 2}}", "failed", "error", None, "not JSON"),
    ("return {'a': float('nan')}", "failed", "error", None, "not JSON"),
    ("return {'a': chr(0xd800)}", "failed", "error", None, "not JSON"),
    (f"return {{'a': 'x' * {LARGEST_OUTPUTS}}}", "failed", "error", None, "at most 1000000"),
    ("open(context.env['STEP_OUTPUTS'], 'w').write('{\"a\": 1}\\nnope\\n')", "failed", "error", None, "line 2 of"),
    ("open(context.env['STEP_OUTPUTS'], 'w').write('[1]')", "failed", "error", None, "line 1 of"),
    ("open(context.env['STEP_OUTPUTS'], 'wb').write(b'\"\\xff\"')", "failed", "error", None, "line 1 of"),
    ("open(context.env['STEP_OUTPUTS'], 'w').write(' ' * 3_000_000)", "failed", "error", None, "at most 1000000"),
    ("os._exit(0)", "failed", "infrastructure", None, "killed"),
    ("os.kill(os.getpid(), signal.SIGSEGV)", "failed", "infrastructure", None, "killed"),
]


@pytest.mark.parametrize(("body", "outcome", "reason", "exit_code", "error"), ENDINGS)
async def test_every_way_to_end(
    body: str, outcome: str, reason: str, exit_code: int | None, error: str, run_locally: Run, code: Any
) -> None:
    result = await run_locally(**code(body))
    assert (result.outcome, result.reason, result.exit_code) == (outcome, reason, exit_code)
    assert error in result.error
    assert result.final == (error in ("never", "not JSON", "at most 1000000"))


async def test_a_traceback_is_in_the_log(run_locally: Run, code: Any, step_request: Make) -> None:
    await run_locally(**code("print('before')\nraise ValueError('odd')"))
    assert log(step_request()) == "before\n"
    text = log(step_request(), "stderr")
    assert "Traceback" in text and "in run\n    raise ValueError('odd')" in text and text.endswith("ValueError: odd\n")


async def test_outputs_come_from_the_file_and_the_return_value(run_locally: Run, code: Any) -> None:
    body = """
with open(os.environ["STEP_OUTPUTS"], "a") as file:
    file.write('{"a": 1, "b": "\u2028"}\\n\\n{"b": 2}\\n')
return {"c": (3,), 4: None}
"""
    result = await run_locally(**code(body))
    assert result.outputs == {"a": 1, "b": 2, "c": [3], "4": None}


async def test_declared_outputs_must_be_written(run_locally: Run, code: Any) -> None:
    result = await run_locally(**code("return {'a': 1}"), expected_outputs=("a", "b"))
    assert (result.outcome, result.final) == ("failed", False)
    assert "`b`" in result.error


SWALLOW = """
print("in", flush=True)
while True:
    try:
        time.sleep(0.02)
    except BaseException:
        {then}
"""
CANCELS = [
    ("while True: time.sleep(0.01)", "cancelled"),
    ("while True: context.check_cancelled()", "cancelled"),
    ("while not context.cancelled: time.sleep(0.01)\nreturn {'a': 1}", "ending wins"),
    (SWALLOW.format(then="return {'a': 1}"), "ending wins"),
    (SWALLOW.format(then="raise ValueError('from cleanup')"), "ending wins"),
    (SWALLOW.format(then="pass"), "by force"),
    ("subprocess.run(['sleep', '300'], check=True)", "cancelled"),
    ("threading.Event().wait()", "cancelled"),
    ("try:\n    time.sleep(300)\nfinally:\n    time.sleep(300)", "by force"),
    ("context.run_process(['sh', '-c', 'trap \"\" TERM; while :; do sleep 0.1; done'])", "cancelled"),
]


@pytest.mark.parametrize(("isolated", "marked"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("body", "note"), CANCELS)
def test_an_early_end_ends_the_step_however_its_code_takes_it(
    body: str, note: str, isolated: bool, marked: bool, code: Any, step_request: Make, tmp_path: Path
) -> None:
    """SIGTERM with the marker of a cancel is one; without it the machine or the services end, and the step is lost."""
    request = step_request(**code(f"pathlib.Path({str(tmp_path / 'in')!r}).touch()\n{body}"), grace_s=0.1)
    folder = attempt_dir(request)
    folder.mkdir(parents=True)
    (folder / REQUEST).write_text(request.model_dump_json())
    argv = [sys.executable, "-m", "steps"] if isolated else [sys.executable, "-c", IN_A_THREAD]
    process = subprocess.Popen([*argv, str(folder / REQUEST)], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "in").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    while "subprocess.run" in body and not descendants(process.pid) and time.monotonic() < deadline:
        time.sleep(0.005)
    if marked:
        (folder / CANCEL).touch()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    result = read_result(folder)
    assert result is not None
    wanted = ("cancelled", "cancelled", None) if marked else ("failed", "infrastructure", TOLD_TO_END)
    assert (result.outcome, result.reason, result.exit_code) == wanted and not result.final
    # A thread that waits in C takes no exception; a signal gets through.
    by_force = note == "by force" or (not isolated and "Event().wait()" in body)
    assert ("by force" in result.error) == by_force
    if not isolated:
        # The process has lived on, and its surroundings are its own again unless the code is stuck.
        assert process.returncode == (7 if by_force else 0)


IN_A_THREAD = """
import os, signal, sys, threading, time
from pathlib import Path
from steps import StepRequest
from steps._host import Host
file = Path(sys.argv[1])
before = dict(os.environ), os.getcwd(), list(sys.path), sys.stdout
host = Host(StepRequest.model_validate_json(file.read_bytes()), file.parent, isolated=False)
signal.signal(signal.SIGTERM, lambda number, frame: host.cancel())
thread = threading.Thread(target=host.run, daemon=True)
thread.start()
while thread.is_alive() and not (host.stuck and (file.parent / "result.json").exists()):
    time.sleep(0.005)
if host.stuck:
    os._exit(7)
assert before == (dict(os.environ), os.getcwd(), list(sys.path), sys.stdout)
"""


ONE_AFTER_ANOTHER = """
import os, sys
from pathlib import Path
from steps import StepRequest
from steps._host import Host
open_before = set(os.listdir("/proc/self/fd"))
for file in map(Path, sys.argv[1:]):
    request = StepRequest.model_validate_json(file.read_bytes())
    result = Host(request, file.parent, gpus=["0"], isolated=False, node="here").run()
    assert (result.outcome, result.node, result.gpus, result.pid) == ("succeeded", "here", ("0",), os.getpid()), result
assert set(os.listdir("/proc/self/fd")) == open_before
"""


def test_attempts_follow_each_other_in_one_process(code: Any, step_request: Make) -> None:
    fields = code("print('hello', context.attempt)\nprint(os.environ.get('HOME'), os.getcwd(), file=sys.stderr)")
    requests = [step_request(f"s{number}", **fields, env={"HOME": f"/home/{number}"}) for number in range(5)]
    for request in requests:
        attempt_dir(request).mkdir(parents=True)
        (attempt_dir(request) / REQUEST).write_text(request.model_dump_json())
    # A process of its own: a host that shares its process ends all its children, here those of other tests.
    files = [str(attempt_dir(request) / REQUEST) for request in requests]
    subprocess.run([sys.executable, "-c", ONE_AFTER_ANOTHER, *files], check=True, timeout=60)
    for number, request in enumerate(requests):
        assert log(request) == "hello 1\n"
        assert log(request, "stderr") == f"/home/{number} {request.working_dir}\n"


def test_only_one_of_many_threads_gets_the_claim(step_request: Make, tmp_path: Path) -> None:
    for number in range(20):
        request = step_request(f"s{number}", params={"command": "true"})
        outcomes: list[str] = []

        def claim(request: StepRequest = request, outcomes: list[str] = outcomes) -> None:
            try:
                Host(request, attempt_dir(request), isolated=False)._claim()
                outcomes.append("claimed")
            except AlreadyStarted:
                outcomes.append("refused")

        threads = [threading.Thread(target=claim) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["claimed"] + ["refused"] * 5
        assert [path.name for path in attempt_dir(request).iterdir()] == [HOST]


async def test_callbacks_run_before_anything_is_killed(run_locally: Run, code: Any, step_request: Make) -> None:
    body = """
process = subprocess.Popen(["sleep", "300"])
context.on_cancel(lambda: print("alive" if process.poll() is None else "dead", flush=True))
context.on_cancel(lambda: 1 / 0)
context.on_cancel(lambda: print("second", flush=True))
context.on_cancel(lambda: time.sleep(300))
process.wait()
time.sleep(300)
"""
    result = await run_locally(**code(body), timeout_s=0.5, grace_s=0.2)
    assert (result.outcome, result.reason) == ("timed_out", "timeout")
    assert log(step_request()) == "alive\nsecond\n"


async def test_heartbeats_and_log_lines_hide_secrets(
    run_locally: Run,
    code: Any,
    step_request: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    local_dispatch: Any,
) -> None:
    secret = 'quo"te\nsecond-line é'
    secrets_dir = tmp_path / "secrets"
    secrets_dir.mkdir()
    (secrets_dir / "TOKEN").write_text(secret + "\n")
    monkeypatch.setenv("ORCHESTRATE_SECRETS_DIR", str(secrets_dir))
    local_dispatch.close()
    body = """
token = os.environ["MY_TOKEN"]
assert token == context.secrets["TOKEN"] and token.count("\\n") == 1
context.heartbeat({"text": f"with {token}", "fraction": 0.5})
context.log(f"log {token}")
print("print", token)
print("json", json.dumps(token), file=sys.stderr)
for character in token:
    os.write(1, character.encode())
with open(os.environ["STEP_OUTPUTS"], "a") as file:
    file.write(json.dumps({"written": token}) + "\\n")
subprocess.run(["sh", "-c", 'echo "child $MY_TOKEN"; tr "\\\\0" " " < /proc/$$/cmdline; echo'], check=True)
raise StepFailed(f"error {token}")
"""
    request = step_request(**code(body), secrets={"MY_TOKEN": "TOKEN"})
    result = await run_locally(**code(body), secrets={"MY_TOKEN": "TOKEN"})
    assert (result.outcome, result.error) == ("failed", "error ***")
    folder = attempt_dir(request)
    assert read_json(folder / PROGRESS) == {"text": "with ***", "fraction": 0.5}
    assert log(request).startswith("log ***\nprint ***\n***child ***\n")
    for path in folder.iterdir():
        for spelling in (secret, json.dumps(secret)[1:-1], "second-line"):
            assert spelling not in path.read_text(), path
    assert json.loads((folder / REQUEST).read_text())["secrets"] == {"MY_TOKEN": "TOKEN"}


async def test_outputs_hide_secrets(
    run_locally: Run, code: Any, step_request: Make, monkeypatch: pytest.MonkeyPatch, local_dispatch: Any
) -> None:
    monkeypatch.setenv("TOKEN", "very-secret")
    local_dispatch.close()
    result = await run_locally(
        **code(
            """
with open(os.environ["STEP_OUTPUTS"], "w") as file:
    json.dump({"b": "very-secret"}, file)
return {"a": ["very-secret"]}
"""
        ),
        secrets={"TOKEN": "TOKEN"},
    )
    assert result.outputs == {"a": ["***"], "b": "***"}
    assert "very-secret" not in (attempt_dir(step_request()) / OUTPUTS).read_text()


async def test_a_missing_secret_or_folder_is_one_clear_final_error(run_locally: Run) -> None:
    result = await run_locally("a", params={"command": "true"}, secrets={"X": "NOWHERE"})
    assert (result.outcome, result.final) == ("failed", True)
    assert "secret `NOWHERE` is not known" in result.error
    result = await run_locally("b", params={"command": "true"}, working_dir="/no/such/folder")
    assert (result.outcome, result.final) == ("failed", True)
    assert "working directory `/no/such/folder` does not exist" in result.error


def test_by_hand_it_prints_the_result_and_takes_ctrl_c(step_request: Make) -> None:
    request = step_request(params={"command": "sleep", "args": ["300"]})
    folder = attempt_dir(request)
    folder.mkdir(parents=True)
    (folder / REQUEST).write_text(request.model_dump_json())
    process = subprocess.Popen([sys.executable, "-m", "steps", str(folder / REQUEST)], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (folder / "stdout.log").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert StepResult.model_validate_json(printed).outcome == "cancelled"


def test_sigterm_at_any_early_moment_gives_a_lost_step_or_none(step_request: Make) -> None:
    for number in range(12):
        request = step_request(f"s{number}", params={"command": "sleep", "args": ["300"]}, grace_s=0.2)
        folder = attempt_dir(request)
        folder.mkdir(parents=True)
        (folder / REQUEST).write_text(request.model_dump_json())
        process = subprocess.Popen([sys.executable, "-m", "steps", str(folder / REQUEST)], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        moment = HOST if number % 2 else "."
        while not (folder / moment).exists() and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(number * 0.002)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        result = read_result(folder)
        if (folder / HOST).exists():
            assert result is not None and (result.outcome, result.reason) == ("failed", "infrastructure")
        else:
            assert result is None
