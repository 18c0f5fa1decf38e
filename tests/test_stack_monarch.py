"""The stack on Monarch: the losses of the local stack to the bit, and runs that outlive the processes of their parts.

A run has a process of its own: Monarch and vLLM keep to the environment that a process begins with.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from rl.config import EngineConfig, LearnerConfig, RunConfig
from rl.rollout import RolloutSettings

pytestmark = pytest.mark.timeout(900)

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


def test_losses_are_those_of_the_local_stack_to_the_bit(quick_model: str, tmp_path: Path) -> None:
    config = _config(quick_model, True, updates=20, max_staleness=0, learner=LearnerConfig(learning_rate=2e-4))
    losses = []
    for stack in ("local", "monarch"):
        events = _run(config.model_copy(update={"stack": stack}), tmp_path / stack, [])
        losses.append([(one["train"]["loss"], one["train"]["gradient_norm"]) for one in _of(events, "update")])
    assert len(losses[0]) == 20
    assert losses[0] == losses[1]
    assert sum(norm > 0 for _, norm in losses[0]) > 5


def test_a_run_outlives_a_generator_and_its_trainer(quick_model: str, tmp_path: Path) -> None:
    """With the weights by one-sided reads; and nothing is left of it."""
    config = _config(quick_model, stack="monarch", transport="monarch_rdma", updates=30, checkpoint_every=5)
    events = _run(config, tmp_path / "run", [(3, "generator 0"), (12, "trainer")])
    lost, replaced = _of(events, "generator_lost"), _of(events, "generator_replaced")
    assert len(lost) == len(replaced) == 1 and "is gone" in lost[0]["message"]
    assert len(_of(events, "trainer_lost")) == len(_of(events, "trainer_replaced")) == 1
    result = events[-1]
    trained = [index for update in result["ledger"]["trained"] for index in update]
    assert result["updates"] == 30 and len(trained) == len(set(trained)) == 60
    assert all(max(one["staleness"]) <= 2 and one["parity"] < 1e-4 for one in _of(events, "update"))
    processes = [path.read_text().splitlines() for path in (tmp_path / "run/stacks").glob("*.process")]
    assert len(processes) == 4
    assert not [pid for _, _, pid, began in processes if _is_alive(int(pid), float(began))]


def _is_alive(pid: int, began: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.create_time() == began and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
