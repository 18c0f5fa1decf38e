"""A secret's value is in the step's environment and nowhere else: every file of the services and runs is searched."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from bridge import services
from bridge.state import State

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
