"""The stack on Ray: the losses of the local stack to the bit, and runs that outlive the processes of their parts.

A run has a driver of its own, because Ray keeps to the token and vLLM to the environment that a process begins with.
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

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

RUN = """
import asyncio, json, os, signal, sys
from pathlib import Path
from rl.config import RunConfig
from rl.train import train

config, folder, kills = RunConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])

def process_of(part):
    processes = [path.read_text().splitlines() for path in folder.glob("stacks/*.process")]
    return int(max((one for one in processes if one[0] == part), key=lambda one: float(one[3]))[2])

def report(event):
    line = json.loads(event.model_dump_json())
    print(json.dumps(line), flush=True)
    if line["event"] == "update" and kills and line["train"]["update"] >= kills[0][0]:
        os.kill(process_of(kills.pop(0)[1]), signal.SIGKILL)

result = asyncio.run(train(config, str(folder), report=report))
print(json.dumps({"event": "result", **json.loads(result.model_dump_json())}))
"""

FAIL = """
import asyncio, os, sys
from pathlib import Path
import psutil
from rl.config import RunConfig
from rl.stack import open_stack

async def main():
    async with open_stack(RunConfig.model_validate_json(sys.argv[1]), sys.argv[2]):
        print("open")

try:
    asyncio.run(main())
except OSError as error:
    print(type(error).__name__)
psutil.wait_procs(psutil.Process().children(recursive=True), timeout=30)
print([process.cmdline() for process in psutil.Process().children(recursive=True)])
print([str(path) for path in Path("/dev/shm").glob(f"orchestrate-weights-{os.getuid()}-{os.getpid()}-*")])
"""


def _config(model: str, **settings: Any) -> RunConfig:
    return RunConfig(
        model=model,
        groups_per_update=2,
        group_size=4,
        groups_in_flight=2,
        filter_zero_variance=False,
        evaluation_prompts=2,
        rollout=RolloutSettings(prompt_style="brief", max_tokens=160, max_tokens_per_turn=20),
        **settings,
    )


def _engine(reproducible: bool = False) -> EngineConfig:
    return EngineConfig(cache_gb=0.05, max_model_tokens=256, reproducible=reproducible)


def _run(config: RunConfig, folder: Path, kills: list[tuple[int, str]], **environment: str) -> list[dict[str, Any]]:
    """The events of a run, and its result as the last one."""
    said = _output(RUN, config.model_dump_json(), str(folder), json.dumps(kills), **environment)
    return [json.loads(line) for line in said if line.startswith("{")]


def _output(script: str, *arguments: str, **environment: str) -> list[str]:
    """Lines of a process that does not know of this one's Ray and vLLM."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OMP_"))}
    ran = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stdout.splitlines()


def _of(events: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [one for one in events if one["event"] == event]


def test_losses_are_those_of_the_local_stack_to_the_bit(quick_model: str, tmp_path: Path, ray_head: Any) -> None:
    settings: dict[str, Any] = {"updates": 20, "max_staleness": 0, "engine": _engine(reproducible=True)}
    config = _config(quick_model, learner=LearnerConfig(learning_rate=2e-4), **settings)
    ray = {
        "RAY_ADDRESS": ray_head.address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(ray_head.token_file),
    }
    losses = []
    for stack, environment in (("local", {}), ("ray", ray)):
        events = _run(config.model_copy(update={"stack": stack}), tmp_path / stack, [], **environment)
        losses.append([(one["train"]["loss"], one["train"]["gradient_norm"]) for one in _of(events, "update")])
    assert len(losses[0]) == 20
    assert losses[0] == losses[1]
    assert sum(norm > 0 for _, norm in losses[0]) > 5
    assert not ray_head.processes("ray::Host")


def test_a_run_outlives_a_generator_and_its_trainer(quick_model: str, tmp_path: Path) -> None:
    """On a Ray of its own, with the weights in Ray's object store; and nothing is left of it."""
    config = _config(
        quick_model, stack="ray", transport="ray_objects", updates=30, checkpoint_every=5, engine=_engine()
    )
    events = _run(config, tmp_path / "run", [(3, "generator 0"), (12, "trainer")])
    lost, replaced = _of(events, "generator_lost"), _of(events, "generator_replaced")
    assert len(lost) == len(replaced) == 1 and "process" in lost[0]["message"]
    assert len(_of(events, "trainer_lost")) == len(_of(events, "trainer_replaced")) == 1
    result = events[-1]
    trained = [index for update in result["ledger"]["trained"] for index in update]
    assert result["updates"] == 30 and len(trained) == len(set(trained)) == 60
    tokens = result["tokens"]
    assert tokens["rolled_back"] > 0
    assert tokens.pop("generated") == sum(tokens.values())
    assert all(max(one["staleness"]) <= 2 and one["parity"] < 1e-4 for one in _of(events, "update"))
    processes = [path.read_text().splitlines() for path in (tmp_path / "run/stacks").glob("*.process")]
    assert len(processes) == 4
    assert not [pid for _, _, pid, began in processes if _is_alive(int(pid), float(began))]


def test_what_was_opened_is_ended_when_the_rest_cannot_be(quick_model: str, tmp_path: Path) -> None:
    config = _config(quick_model, stack="ray", engine=EngineConfig(name="hf", max_model_tokens=256))
    said = _output(FAIL, config.model_dump_json(), str(tmp_path / "nowhere"))
    assert said == ["OSError", "[]", "[]"]


def _is_alive(pid: int, began: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.create_time() == began and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
