"""A Monarch trainer with Ray generators: the losses of the local stack to the bit, through losses of both parts.

A run has a process of its own: Monarch, Ray and vLLM keep to the environment that a process begins with.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rl.config import EngineConfig, LearnerConfig, RunConfig
from rl.rollout import RolloutSettings
from rl.stack import open_stack

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

RUN = """
import asyncio, json, os, signal, sys, time
from pathlib import Path
from rl.config import RunConfig
from rl.train import train

config, folder, kills = RunConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])

def process_of(part):
    processes = [path.read_text().splitlines() for path in folder.glob("stacks/*.process")]
    return int(max((one for one in processes if one[0] == part), key=lambda one: float(one[3]))[2])

def report(event):
    print(event.model_dump_json(), flush=True)
    if event.event == "update" and kills and event.train.update >= kills[0][0]:
        os.kill(process_of(kills.pop(0)[1]), signal.SIGKILL)

result = asyncio.run(train(config, str(folder), report=report))
print(json.dumps({"event": "result", **json.loads(result.model_dump_json())}))
"""


def _config(model: str, reproducible: bool = False, **settings: Any) -> RunConfig:
    return RunConfig(
        model=model,
        groups_per_update=2,
        group_size=4,
        groups_in_flight=2,
        filter_zero_variance=False,
        evaluation_prompts=2,
        rollout=RolloutSettings(prompt_style="brief", max_tokens=160, max_tokens_per_turn=20),
        engine=EngineConfig(cache_gb=0.05, max_model_tokens=256, reproducible=reproducible),
        **settings,
    )


def _run(config: RunConfig, folder: Path, kills: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """The events of a run, and its result as the last one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OMP_"))}
    ran = subprocess.run(
        [sys.executable, "-c", RUN, config.model_dump_json(), str(folder), json.dumps(kills)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


def _of(events: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [one for one in events if one["event"] == event]


def test_losses_are_those_of_the_local_stack_to_the_bit_whatever_is_lost(quick_model: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"updates": 20, "max_staleness": 0, "checkpoint_every": 5}
    config = _config(quick_model, True, learner=LearnerConfig(learning_rate=2e-4), **settings)
    local = _of(_run(config, tmp_path / "local", []), "update")
    hybrid = config.model_copy(update={"stack": "hybrid"})
    events = _run(hybrid, tmp_path / "hybrid", [(3, "generator 0"), (12, "trainer")])
    assert [len(_of(events, f"{part}_replaced")) for part in ("generator", "trainer")] == [1, 1]
    losses = {one["train"]["update"]: (one["train"]["loss"], one["train"]["gradient_norm"]) for one in local}
    assert len(losses) == 20 and sum(norm > 0 for _, norm in losses.values()) > 5
    updates = [one["train"] for one in _of(events, "update")]
    assert {one["update"] for one in updates} == set(losses)
    assert all(losses[one["update"]] == (one["loss"], one["gradient_norm"]) for one in updates)


async def test_a_store_that_one_half_cannot_reach_is_refused() -> None:
    with pytest.raises(ValueError, match="`transport` is `ray_objects`, which one half of stack `hybrid`"):
        async with open_stack(RunConfig(stack="hybrid", transport="ray_objects")):
            raise AssertionError
