"""The `rl_train` step: trains in the plan's folder, goes on from its checkpoint, stops when it is told to."""

import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from rl.metrics import METRICS
from rl.run_folder import run_summary
from steps import StepCancelled, StepError, StepResult
from steps.rl_train import Params, run

SHORT: dict[str, Any] = {
    "stack": "scripted",
    "groups_per_update": 1,
    "group_size": 4,
    "evaluation_prompts": 2,
    "folder": "out/run",
}


async def test_the_real_host_runs_it_and_again_costs_nothing(
    run_locally: Callable[..., Awaitable[StepResult]], tmp_path: Path
) -> None:
    result = await run_locally(type="rl_train", params={**SHORT, "updates": 1})
    assert result.outcome == "succeeded", result.error
    assert result.outputs["folder"] == str(tmp_path / "out/run")
    assert result.outputs["updates"] == 1
    assert 0 <= result.outputs["accuracy_interval"]["low"] <= result.outputs["accuracy"] <= 1
    assert result.outputs["model"] == ""


def test_a_finished_run_is_found_and_a_longer_one_goes_on(step_context: Callable[..., Any], tmp_path: Path) -> None:
    context = step_context()
    first = run(Params(**SHORT, updates=1), context)
    assert any(isinstance(said, dict) and said["fraction"] == 1.0 for said in context.progress)
    assert "update 1/1  reward" in context.text()
    before = (tmp_path / "out/run" / METRICS).stat().st_mtime_ns
    assert run(Params(**SHORT, updates=1), context) == first
    assert (tmp_path / "out/run" / METRICS).stat().st_mtime_ns == before
    assert run(Params(**SHORT, updates=2), context)["updates"] == 2


def test_another_run_in_the_folder_is_refused_for_good(step_context: Callable[..., Any]) -> None:
    run(Params(**SHORT, updates=1), step_context())
    with pytest.raises(StepError, match="`seed` was `0` and is `1`"):
        run(Params(**SHORT, updates=1, seed=1), step_context())


def test_a_model_that_is_not_there_is_refused_for_good(step_context: Callable[..., Any]) -> None:
    with pytest.raises(StepError, match=r"there is no model `\./nowhere`"):
        run(Params(folder="run", model="./nowhere"), step_context())


def test_a_cancelled_step_leaves_a_checkpoint_and_a_retry_goes_on(
    step_context: Callable[..., Any], tmp_path: Path
) -> None:
    context, folder = step_context(), tmp_path / "out/run"
    context.grace_s = 60.0
    ended: list[BaseException] = []

    def attempt() -> None:
        try:
            run(Params(**SHORT, updates=1000), context)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    context.wait_for_line("update 1/1000")
    context.cancel()
    thread.join(60)
    assert [type(error) for error in ended] == [StepCancelled]
    updates = run_summary(folder).updates
    assert 0 < updates < 1000

    again = step_context(key="flow/run/step/2")
    began = time.monotonic()
    assert run(Params(**SHORT, updates=updates + 1), again)["updates"] == updates + 1
    assert f"update {updates + 1}/{updates + 1}" in again.text() and "update 1/" not in again.text()
    assert time.monotonic() - began < 120
