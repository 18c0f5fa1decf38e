"""The stack on Ray: the losses of the local stack to the bit, and runs that outlive the processes of their parts.

A run has a driver of its own, because Ray keeps to the token and vLLM to the environment that a process begins with.
"""

from pathlib import Path
from typing import Any

import pytest

from rl.config import EngineConfig, LearnerConfig

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


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


def test_losses_are_those_of_the_local_stack_to_the_bit(stack_run: Any, tmp_path: Path, ray_head: Any) -> None:
    settings: dict[str, Any] = {"updates": 20, "max_staleness": 0}
    config = stack_run.config(reproducible=True, learner=LearnerConfig(learning_rate=2e-4), **settings)
    ray = {
        "RAY_ADDRESS": ray_head.address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(ray_head.token_file),
    }
    losses = []
    for stack, environment in (("local", {}), ("ray", ray)):
        events = stack_run.events(config.model_copy(update={"stack": stack}), tmp_path / stack, **environment)
        losses.append(events.losses)
    assert len(losses[0]) == 20
    assert losses[0] == losses[1]
    assert sum(norm > 0 for _, norm in losses[0]) > 5
    assert not ray_head.processes("ray::Host")


def test_a_run_outlives_a_generator_and_its_trainer(stack_run: Any, tmp_path: Path) -> None:
    """On a Ray of its own, with the weights in Ray's object store; and nothing is left of it."""
    config = stack_run.config(stack="ray", transport="ray_objects", updates=30, checkpoint_every=5)
    events = stack_run.events(config, tmp_path / "run", [(3, "generator 0"), (12, "trainer")])
    lost, replaced = events.of("generator_lost"), events.of("generator_replaced")
    assert len(lost) == len(replaced) == 1 and "process" in lost[0]["message"]
    assert len(events.of("trainer_lost")) == len(events.of("trainer_replaced")) == 1
    result = events[-1]
    trained = [index for update in result["ledger"]["trained"] for index in update]
    assert result["updates"] == 30 and len(trained) == len(set(trained)) == 60
    tokens = result["tokens"]
    assert tokens["rolled_back"] > 0
    assert tokens.pop("generated") == sum(tokens.values())
    assert all(max(one["staleness"]) <= 2 and one["parity"] < 1e-4 for one in events.of("update"))
    processes = stack_run.processes(tmp_path / "run")
    assert len(processes) == 4
    assert not [pid for pid, alive in processes if alive]


def test_what_was_opened_is_ended_when_the_rest_cannot_be(stack_run: Any, tmp_path: Path) -> None:
    engine = EngineConfig(name="hf", max_model_tokens=256)
    config = stack_run.config(stack="ray").model_copy(update={"engine": engine})
    said = stack_run.output(FAIL, config.model_dump_json(), str(tmp_path / "nowhere"))
    assert said == ["OSError", "[]", "[]"]
