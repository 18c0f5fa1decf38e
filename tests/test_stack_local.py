"""The stack in one process: whole runs with both engines, a broken engine's place, and nothing left behind."""

import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from rl.config import EngineConfig, EngineName, LearnerConfig, RunConfig
from rl.metrics import EvaluationRecord, RunEvent, UpdateRecord
from rl.prompts import PromptSet
from rl.rollout import RolloutSettings
from rl.stack import GroupRequest, PartLost, open_stack
from rl.train import train

pytestmark = pytest.mark.timeout(600)


def _config(model: str, engine: EngineName, **settings: Any) -> RunConfig:
    return RunConfig(
        model=model,
        updates=4,
        groups_per_update=2,
        group_size=4,
        groups_in_flight=2,
        filter_zero_variance=False,
        evaluation_prompts=4,
        rollout=RolloutSettings(prompt_style="brief", max_tokens=160, max_tokens_per_turn=20),
        engine=EngineConfig(name=engine, cache_gb=0.05, max_model_tokens=256),
        learner=LearnerConfig(learning_rate=1e-3),
        **settings,
    )


def _left() -> list[str]:
    """Stores and threads of this process that are still there."""
    folder = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    stores = [str(path) for path in folder.glob(f"orchestrate-weights-{os.getuid()}-{os.getpid()}-*")]
    return stores + [one.name for one in threading.enumerate() if one.name.startswith(("learner", "engine-"))]


async def test_an_asynchronous_run_with_vllm(quick_model: str, tmp_path: Path) -> None:
    events: list[RunEvent] = []
    result = await train(_config(quick_model, "vllm", num_generators=2), str(tmp_path), report=events.append)
    updates = [event for event in events if isinstance(event, UpdateRecord)]
    assert result.updates == 4 and [one.train.version for one in updates] == [1, 2, 3, 4]
    trained = [index for update in result.ledger.trained for index in update]
    assert len(trained) == len(set(trained)) == 8
    assert all(0 < one.parity < 1e-4 and max(one.staleness) <= 2 for one in updates)
    assert any(one.train.gradient_norm > 0 for one in updates)
    assert [event.version for event in events if isinstance(event, EvaluationRecord)] == [4]
    assert not _left()


async def test_runs_with_the_control_engine_repeat_themselves(quick_model: str, tmp_path: Path) -> None:
    losses = []
    for name in ("once", "again"):
        events: list[RunEvent] = []
        config = _config(quick_model, "hf", max_staleness=0)
        config = config.model_copy(update={"engine": config.engine.model_copy(update={"reproducible": True})})
        await train(config, str(tmp_path / name), report=events.append)
        losses.append([event.train.loss for event in events if isinstance(event, UpdateRecord)])
    assert losses[0] == losses[1]
    assert any(losses[0])


async def test_an_engine_that_broke_down_is_replaced_with_the_weights_of_the_run(quick_model: str) -> None:
    config = _config(quick_model, "hf")
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


async def test_what_was_opened_is_ended_when_the_rest_cannot_be(quick_model: str, tmp_path: Path) -> None:
    with pytest.raises(OSError):
        async with open_stack(_config(quick_model, "hf"), str(tmp_path / "nowhere")):
            pass
    assert not _left()
