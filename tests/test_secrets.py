"""A secret's value is in the step's environment and nowhere else: every file of the services and runs is searched."""

import asyncio
import os
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from temporalio.service import RPCError

from bridge import services
from bridge.client import Client, ClientError, RunConflict, SecretsNeeded
from bridge.housekeeping import keep_house
from bridge.plan import Plan, Step
from bridge.report import RunReport
from bridge.run_secrets import UNTOUCHED_S
from bridge.state import State
from steps._secrets import run_secrets_dir

pytestmark = pytest.mark.temporal

ORCHESTRATE = str(Path(sys.executable).with_name("orchestrate"))
VALUE = "hunter2-0f9a7c-correct-horse"

PLAN = """
steps:
  - id: use
    type: command
    command: bash
    args:
      - -c
      - |
        printf '%s' "${API_TOKEN:0:9}"; sleep 0.3; printf '%s\\n' "${API_TOKEN:9}"
        echo "on stderr: $API_TOKEN" >&2
        test "$API_TOKEN" = "$EXPECTED_START-0f9a7c-correct-horse" && echo same > same.txt
        echo "{\\"seen\\": \\"$API_TOKEN\\"}" >> $STEP_OUTPUTS
        touch running; while ! test -e stop; do sleep 0.05; done
        exit 3
    env: {EXPECTED_START: hunter2}
    secrets: {API_TOKEN: MY_TOKEN}
"""


def files_with(value: bytes, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and value in path.read_bytes()]


@pytest.mark.parametrize("given_by", ["environment", "store"])
async def test_a_secret_is_nowhere_but_in_the_steps_environment(
    local_state: State, tmp_path: Path, given_by: str
) -> None:
    plan = tmp_path / "plan" / "secret.yaml"
    plan.parent.mkdir()
    plan.write_text(PLAN)
    environment = {**os.environ, "ORCHESTRATE_HOME": str(local_state.dir)}
    if given_by == "store":
        await asyncio.to_thread(
            subprocess.run,
            [ORCHESTRATE, "secret", "set", "MY_TOKEN"],
            input=VALUE.encode(),
            env=environment,
            check=True,
        )
    else:
        environment["MY_TOKEN"] = VALUE
    run = subprocess.Popen([ORCHESTRATE, plan, "--json"], env=environment, stdout=-1, stderr=-1)
    deadline = asyncio.get_running_loop().time() + 60
    while not (plan.parent / "running").exists():
        assert run.poll() is None, run.communicate()
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.05)
    arguments = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in arguments if VALUE in line]
    (plan.parent / "stop").touch()
    stdout, stderr = await asyncio.to_thread(run.communicate, timeout=60)
    assert run.returncode == 1, stderr
    assert (plan.parent / "same.txt").exists()
    assert VALUE not in (stdout + stderr).decode()
    assert b"on stderr: ***" in stdout
    left = files_with(VALUE.encode(), tmp_path)
    assert left == ([local_state.secrets_dir / "MY_TOKEN"] if given_by == "store" else [])
    await asyncio.to_thread(services.stop, local_state)
    left = files_with(VALUE.encode(), tmp_path)
    assert left == ([local_state.secrets_dir / "MY_TOKEN"] if given_by == "store" else [])


def test_a_secret_that_nobody_knows_is_named_before_anything_runs(local_state: State, tmp_path: Path) -> None:
    plan = tmp_path / "secret.yaml"
    plan.write_text(PLAN)
    environment = {**os.environ, "ORCHESTRATE_HOME": str(local_state.dir)}
    run = subprocess.run([ORCHESTRATE, plan], env=environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert "MY_TOKEN" in run.stderr
    assert "orchestrate secret set MY_TOKEN" in run.stderr
    assert not (tmp_path / "running").exists()


def test_the_shell_that_starts_a_run_has_the_last_word(local_state: State, tmp_path: Path) -> None:
    plan = tmp_path / "secret.yaml"
    script = 'echo "$MY_TOKEN" > seen'
    plan.write_text(f"steps: [{{id: use, type: command, command: sh, args: [-c, '{script}'], secrets: [MY_TOKEN]}}]\n")
    environment = {**os.environ, "ORCHESTRATE_HOME": str(local_state.dir)}

    def seen_by_a_run(**own: str) -> str:
        shell = {**environment, **own}
        run = subprocess.run([ORCHESTRATE, plan], env=shell, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        assert not any(value in run.stdout + run.stderr for value in own.values())
        return (tmp_path / "seen").read_text().removesuffix("\n")

    assert seen_by_a_run(MY_TOKEN="value-of-the-first-shell") == "value-of-the-first-shell"
    assert seen_by_a_run(MY_TOKEN="value-of-the-second") == "value-of-the-second"
    store = [ORCHESTRATE, "secret", "set", "MY_TOKEN"]
    subprocess.run(store, input=b"value-that-is-stored", env=environment, check=True, timeout=60)
    assert seen_by_a_run(MY_TOKEN="value-of-the-third") == "value-of-the-third"
    assert seen_by_a_run() == "value-that-is-stored"
    assert run_folders(local_state) == []


def run_folders(state: State) -> list[Path]:
    """What is kept of secrets that were handed over."""
    return [path for path in (state.secrets_dir / "runs").glob("*") if path.is_dir()]


@pytest.fixture
async def client(
    open_client: Callable[..., Any], temporal_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Client]:
    """As the gateway has it, with the worker in this process."""
    monkeypatch.setenv("ORCHESTRATE_SECRETS_DIR", str(State(tmp_path / "state").secrets_dir))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    async with open_client(temporal_server, tmp_path, local=True) as client:
        yield client


def shell(step_id: str, script: str, **fields: Any) -> Step:
    return Step.model_validate(
        {"id": step_id, "type": "command", "params": {"command": "sh", "args": ["-c", script]}, **fields}
    )


GATED = Plan(
    name="gated",
    secrets=["MY_TOKEN"],
    steps=[
        shell("wait", "touch running; until [ -e gate ]; do sleep 0.05; done"),
        shell("use", 'printf %s "$MY_TOKEN" > seen', depends_on=["wait"]),
    ],
)
"""Its second step resolves the secret when the gate is open."""


async def end(client: Client, workflow_id: str, folder: Path) -> RunReport:
    (folder / "gate").touch()
    report = await client.wait(workflow_id)
    assert report.outcome == "succeeded", report.steps
    return report


def test_the_folder_of_a_run_is_its_own_whatever_its_id(tmp_path: Path) -> None:
    ids = ["..", ".", "", "/", "/data", "../x", "team", "team/a", "team_a", "x" * 1000, "\udcff"]
    folders = [run_secrets_dir(tmp_path, workflow_id) for workflow_id in ids]
    assert {folder.parent for folder in folders} == {tmp_path / "runs"}
    assert len({os.path.normpath(folder) for folder in folders}) == len(ids)


async def test_the_end_of_a_run_removes_nothing_but_its_own(client: Client, tmp_path: Path) -> None:
    (client.state.secrets_dir / "STORED").write_text("stored")
    data = tmp_path / "data"
    data.mkdir()
    (data / "precious").touch()
    prefix = uuid.uuid4().hex
    await client.start(GATED, plan_dir=tmp_path, workflow_id=f"{prefix}/a", secrets={"MY_TOKEN": VALUE})
    for secrets in ({}, {"MY_TOKEN": "of-another"}):
        plan = Plan(name="other", secrets=list(secrets), steps=[shell("nothing", "true")])
        for workflow_id in ("..", str(data), prefix):
            report = await client.run(plan, plan_dir=tmp_path, workflow_id=workflow_id, secrets=secrets)
            assert report.outcome == "succeeded", report.steps
    assert (data / "precious").exists()
    assert (client.state.secrets_dir / "STORED").exists()
    await end(client, f"{prefix}/a", tmp_path)
    assert (tmp_path / "seen").read_text() == VALUE
    assert run_folders(client.state) == []


async def test_an_id_with_control_characters_is_refused(client: Client, tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=r"`a\\x1b\[2J`, wanted a text without control characters"):
        await client.start(GATED, plan_dir=tmp_path, workflow_id="a\x1b[2J", secrets={"MY_TOKEN": VALUE})
    assert run_folders(client.state) == []


async def test_a_conflict_leaves_the_secrets_of_the_run_that_goes_on(client: Client, tmp_path: Path) -> None:
    workflow_id = uuid.uuid4().hex
    start: dict[str, Any] = {"plan_dir": tmp_path, "workflow_id": workflow_id}
    await client.start(GATED, **start, secrets={"MY_TOKEN": VALUE})
    (folder,) = run_folders(client.state)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    with pytest.raises(RunConflict):
        await client.start(GATED, **start, secrets={"MY_TOKEN": "of-the-conflict"})
    (client.state.secrets_dir / "MY_TOKEN").write_text("stored")
    with pytest.raises(RunConflict):
        await client.start(GATED, **start)
    await end(client, workflow_id, tmp_path)
    assert (tmp_path / "seen").read_text() == VALUE
    assert run_folders(client.state) == []


async def test_two_starts_at_once_do_not_mix_their_secrets(client: Client, tmp_path: Path) -> None:
    workflow_id = uuid.uuid4().hex
    values = [f"{VALUE}-{number}" for number in range(8)]
    starts = [
        client.start(GATED, plan_dir=tmp_path, workflow_id=workflow_id, secrets={"MY_TOKEN": value}) for value in values
    ]
    ends = await asyncio.gather(*starts, return_exceptions=True)
    (started,) = [value for value, outcome in zip(values, ends, strict=True) if not isinstance(outcome, RunConflict)]
    await end(client, workflow_id, tmp_path)
    assert (tmp_path / "seen").read_text() == started


async def test_nothing_is_kept_for_a_run_that_does_not_start(client: Client, tmp_path: Path) -> None:
    two = GATED.model_copy(update={"secrets": ["MY_TOKEN", "NOBODY_KNOWS"]})
    with pytest.raises(SecretsNeeded) as needed:
        await client.start(two, plan_dir=tmp_path, secrets={"MY_TOKEN": VALUE})
    assert needed.value.args == ("NOBODY_KNOWS",)
    refused = Client(client.temporal, "q" * 5000, client.state, local=True)
    with pytest.raises(RPCError):
        await refused.start(GATED, plan_dir=tmp_path, secrets={"MY_TOKEN": VALUE})
    assert files_with(VALUE.encode(), client.state.dir) == []


async def test_values_of_a_terminated_run_are_not_those_of_the_next(client: Client, tmp_path: Path) -> None:
    workflow_id = uuid.uuid4().hex
    await client.start(GATED, plan_dir=tmp_path, workflow_id=workflow_id, secrets={"MY_TOKEN": VALUE})
    await client.temporal.get_workflow_handle(workflow_id).terminate()
    (client.state.secrets_dir / "MY_TOKEN").write_text("stored")
    await client.start(GATED, plan_dir=tmp_path, workflow_id=workflow_id)
    assert run_folders(client.state) == []
    await end(client, workflow_id, tmp_path)
    assert (tmp_path / "seen").read_text() == "stored"


async def test_a_caller_in_another_process_is_asked_before_the_store(client: Client, tmp_path: Path) -> None:
    text = "secrets: [A, B]\nsteps: [{id: use, type: command, command: sh, args: [-c, 'echo $A $B > seen']}]"
    (client.state.secrets_dir / "A").write_text("stored")
    (client.state.secrets_dir / "B").write_text("stored")
    path = str(tmp_path / "ask.yaml")
    for said, asked in (({}, ("A", "B")), ({"A": "own"}, ("B",))):
        with pytest.raises(SecretsNeeded) as needed:
            await client.submit(text, path, secrets=said)
        assert needed.value.args == asked
    handle = await client.submit(text, path, secrets={"A": "own", "B": None})
    await client.wait(handle.workflow_id)
    assert (tmp_path / "seen").read_text() == "own stored\n"
    with pytest.raises(SecretsNeeded):
        await client.retry(handle.workflow_id)


async def test_a_callers_environment_is_its_own(client: Client, tmp_path: Path) -> None:
    workflow_id, environment = uuid.uuid4().hex, {"MY_TOKEN": VALUE, "UNASKED": "nobody-asked-for-this"}
    (client.state.secrets_dir / "MY_TOKEN").write_text("stored")
    library = Client(client.temporal, client.task_queue, client.state, local=True, environment=environment)
    await library.start(GATED, plan_dir=tmp_path, workflow_id=workflow_id)
    assert files_with(b"nobody-asked-for-this", client.state.dir) == []
    await end(client, workflow_id, tmp_path)
    assert (tmp_path / "seen").read_text() == VALUE


async def test_the_secrets_of_runs_that_are_over_are_swept(client: Client, tmp_path: Path) -> None:
    prefix, ends = uuid.uuid4().hex, ("runs", "terminated", "just-terminated", "never-started")
    for name in ends:
        workflow_id = f"{prefix}-{name}"
        await client.start(GATED, plan_dir=tmp_path, workflow_id=workflow_id, secrets={"MY_TOKEN": VALUE})
        if name != "runs":
            await client.temporal.get_workflow_handle(workflow_id).terminate()
    folders = {name: run_secrets_dir(client.state.secrets_dir, f"{prefix}-{name}") for name in ends}
    (folders["never-started"] / ".run").unlink()
    nested = client.state.secrets_dir / "runs" / "team" / "a"
    nested.mkdir(parents=True)
    (nested / "MY_TOKEN").write_text(VALUE)
    long_ago = time.time() - UNTOUCHED_S - 60
    for folder in (*folders.values(), nested.parent):
        if folder != folders["just-terminated"]:
            for path in (*folder.rglob("*"), folder):
                os.utime(path, (long_ago, long_ago))
    await keep_house(client.temporal, client.state)
    assert set(run_folders(client.state)) == {folders["runs"], folders["just-terminated"]}
    await end(client, f"{prefix}-runs", tmp_path)
    assert (tmp_path / "seen").read_text() == VALUE


async def test_a_ray_address_that_the_services_do_not_use_is_said(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = "steps: [{id: use, type: command, command: 'true'%s}]"
    for resources, used, warnings in (
        (", resources: {cpus: 1}", "", 1),
        (", resources: {cpus: 1}", "10.0.0.2:6379", 1),
        (", resources: {cpus: 1}", "10.0.0.1:6379", 0),
        ("", "", 0),
    ):
        monkeypatch.setenv("RAY_ADDRESS", used)
        handle = await client.submit(plan % resources, str(tmp_path / "ray.yaml"), ray_address="10.0.0.1:6379")
        assert len(handle.warnings) == warnings
        assert all("RAY_ADDRESS is `10.0.0.1:6379`, but" in warning for warning in handle.warnings)
        await client.wait(handle.workflow_id)
