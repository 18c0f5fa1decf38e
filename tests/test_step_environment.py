"""What a step sees of its node's environment."""

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from steps import StepRequest, StepResult
from steps._environment import step_environment

Make = Callable[..., StepRequest]


def test_other_variables_of_the_worker_are_invisible(
    monkeypatch: pytest.MonkeyPatch, step_request: Make, tmp_path: Path
) -> None:
    for name in (
        "TEMPORAL_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "RAY_ADDRESS",
        "ORCHESTRATE_SECRETS_DIR",
        "XPATH",
        "PATHX",
    ):
        monkeypatch.setenv(name, "hidden")
    for name in ("LC_TIME", "HF_HOME", "https_proxy"):
        monkeypatch.setenv(name, "seen")
    found = step_environment(step_request(), {}, tmp_path, ())
    assert "hidden" not in found.values()
    assert {"LC_TIME", "HF_HOME", "https_proxy"} <= found.keys()


def test_declared_variables_win_and_secrets_over_them(
    monkeypatch: pytest.MonkeyPatch, step_request: Make, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", "/node")
    request = step_request(env={"HOME": "/plan", "A": "plan", "STEP_ID": "forged"}, secrets={"A": "name-of-secret"})
    found = step_environment(request, {"name-of-secret": "value"}, tmp_path, ["2", "3"])
    assert (found["HOME"], found["A"], found["CUDA_VISIBLE_DEVICES"]) == ("/plan", "value", "2,3")
    assert (found["STEP_ID"], found["STEP_ATTEMPT"]) == ("step", "1")
    assert found["STEP_OUTPUTS"] == str(tmp_path / "outputs.jsonl")
    assert "CUDA_VISIBLE_DEVICES" not in step_environment(request, {"name-of-secret": "value"}, tmp_path, [])


def test_the_node_can_allow_more(monkeypatch: pytest.MonkeyPatch, step_request: Make, tmp_path: Path) -> None:
    monkeypatch.setenv("ORCHESTRATE_ENV_ALLOW", "LAB_*, SITE,")
    monkeypatch.setenv("LAB_NAME", "x")
    monkeypatch.setenv("SITE", "y")
    monkeypatch.setenv("SITES", "z")
    found = step_environment(step_request(), {}, tmp_path, ())
    assert (found["LAB_NAME"], found["SITE"], found.get("SITES")) == ("x", "y", None)


async def test_a_program_sees_exactly_this_environment(
    run_locally: Callable[..., Awaitable[StepResult]], step_request: Make
) -> None:
    result = await run_locally(params={"command": "env", "args": ["-0"]}, env={"A": "two\nlines", "EMPTY": ""})
    assert result.outcome == "succeeded"
    folder = Path(result.attempt_dir)
    pairs = (folder / "stdout.log").read_bytes().decode().rstrip("\0").split("\0")
    found = dict(pair.split("=", 1) for pair in pairs)
    expected = step_environment(step_request(env={"A": "two\nlines", "EMPTY": ""}), {}, folder, ())
    assert found == expected
    assert os.environ["PATH"] in found["PATH"]
