"""The stack without a framework: whole runs with both engines, a broken engine's place, and nothing left behind."""

import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from rl.config import EngineName, LearnerConfig, RunConfig
from rl.metrics import EvaluationRecord, RunEvent, UpdateRecord
from rl.prompts import PromptSet
from rl.stack import GroupRequest, PartLost, open_stack
from rl.train import train

pytestmark = pytest.mark.timeout(600)


def _config(stack_run: Any, engine: EngineName, **settings: Any) -> RunConfig:
    learner = LearnerConfig(learning_rate=1e-3)
    config: RunConfig = stack_run.config(engine=engine, updates=4, evaluation_prompts=4, learner=learner, **settings)
    return config


def _hosts_a_part(process: psutil.Process) -> bool:
    try:
        return "rl.host_process" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def _left() -> list[str]:
    """Stores, threads and processes of this process that are still there."""
    folder = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    stores = [str(path) for path in folder.glob(f"orchestrate-weights-{os.getuid()}-{os.getpid()}-*")]
    hosts = [str(one.pid) for one in psutil.Process().children() if _hosts_a_part(one)]
    return stores + hosts + [one.name for one in threading.enumerate() if one.name.startswith("engine-")]


async def test_an_asynchronous_run_with_vllm(stack_run: Any, tmp_path: Path) -> None:
    events: list[RunEvent] = []
    result = await train(_config(stack_run, "vllm", num_generators=2), str(tmp_path), report=events.append)
    updates = [event for event in events if isinstance(event, UpdateRecord)]
    assert result.updates == 4 and [one.train.version for one in updates] == [1, 2, 3, 4]
    trained = [index for update in result.ledger.trained for index in update]
    assert len(trained) == len(set(trained)) == 8
    assert all(0 < one.parity < 1e-4 and max(one.staleness) <= 2 for one in updates)
    assert any(one.train.gradient_norm > 0 for one in updates)
    assert [event.version for event in events if isinstance(event, EvaluationRecord)] == [4]
    assert not _left()


async def test_runs_with_the_control_engine_repeat_themselves(stack_run: Any, tmp_path: Path) -> None:
    losses = []
    for name in ("once", "again"):
        events: list[RunEvent] = []
        config = _config(stack_run, "hf", max_staleness=0)
        config = config.model_copy(update={"engine": config.engine.model_copy(update={"reproducible": True})})
        await train(config, str(tmp_path / name), report=events.append)
        losses.append([event.train.loss for event in events if isinstance(event, UpdateRecord)])
    assert losses[0] == losses[1]
    assert any(losses[0])


async def test_an_engine_that_broke_down_is_replaced_with_the_weights_of_the_run(stack_run: Any) -> None:
    config = _config(stack_run, "hf")
    request = GroupRequest(
        group_id="0", prompt=PromptSet(config.tasks, "train", 0)[0], group_size=2, seed=0, settings=config.rollout
    )
    async with open_stack(config) as stack:
        await stack.trainer.publish()
        await stack.generators[0].close()  # type: ignore[attr-defined]  # what ends its engine
        with pytest.raises(PartLost, match="generator 0"):
            await stack.generators[0].generate(request)
        await stack.replace_generator(0, 0)
        assert (await stack.generators[0].generate(request)).num_sampled > 0
        await stack.replace_trainer("")
        assert (await stack.trainer.publish()).version == 0
        assert (await stack.generators[0].load(0)).parity < 1e-4
    assert not _left()


async def test_what_was_opened_is_ended_when_the_rest_cannot_be(stack_run: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError):
        async with open_stack(_config(stack_run, "hf"), str(tmp_path / "nowhere")):
            pass
    assert not _left()
