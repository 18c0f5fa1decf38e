"""Runs whose device time is slept: weights that really travel, and cells of the benchmark on every stack."""

import asyncio
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rl.bench.cell import CellRequest
from rl.bench.cells import cells
from rl.bench.child import measure_apart
from rl.bench.config import BenchConfig
from rl.bench.results import CellRun
from rl.config import EngineConfig, LearnerConfig, RunConfig
from rl.emulation import EngineEmulation, LearnerEmulation
from rl.generator import GeneratorHost
from rl.ledger import group_id
from rl.lengths import LengthTail
from rl.models import TINY_TOKENIZER
from rl.prompts import PromptSet
from rl.rollout import RolloutSettings
from rl.stack import GroupRequest
from rl.tokenizer import TinyTokenizer
from rl.trainer import TrainerHost
from rl.transports import shared_memory
from rl.types import Batch, Task
from rl.weights import open_reader

ENGINE = EngineEmulation(decode_s=0.002, decode_s_per_sequence=0.0)
LEARNER = LearnerEmulation(update_s=0.05, update_s_per_token=1e-5, num_bytes=3 << 20)
LENGTHS = LengthTail(median_tokens=10, max_tokens=40)


@pytest.fixture(scope="module")
def no_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """All of a model that is needed where none computes: a tokenizer, and the size of its vocabulary."""
    folder = tmp_path_factory.mktemp("no-model")
    tokenizer = TinyTokenizer()
    tokenizer.save(folder / TINY_TOKENIZER)
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(tokenizer)}))
    save_file({"nothing": torch.zeros(1)}, folder / "model.safetensors")
    return str(folder)


async def test_weights_of_the_wanted_size_are_published_pulled_and_restored(no_model: str, tmp_path: Path) -> None:
    config = RunConfig(
        model=no_model,
        engine=EngineConfig(name="emulated", emulation=ENGINE, max_model_tokens=256),
        learner=LearnerConfig(emulation=LEARNER),
        rollout=RolloutSettings(prompt_style="brief", lengths=LENGTHS, max_turns=1, max_tokens=256),
    )
    store = shared_memory.create()
    trainer, generator = TrainerHost(config, no_model, store), GeneratorHost(config, 0, no_model, store)
    try:
        await trainer.open()
        await generator.open()
        request = GroupRequest(
            group_id=group_id(0),
            prompt=PromptSet([Task(name="simple")], "train", 0)[0],
            group_size=4,
            seed=0,
            settings=config.rollout,
        )
        group = await generator.generate(request)
        lengths = [LENGTHS.length(0, group.id, sample) for sample in range(4)]
        assert [trajectory.num_sampled for trajectory in group.trajectories] == lengths
        metrics = await trainer.update(Batch(update=0, version=0, groups=(group,)))
        assert metrics.duration_s >= LEARNER.update_s
        assert metrics.num_tokens == sum(lengths)
        assert math.isnan(metrics.k3_kl)
        assert metrics.fresh is None
        published = await trainer.publish()
        loaded = await generator.load(1)
        assert published.num_bytes == loaded.num_bytes == LEARNER.num_bytes
        assert math.isnan(loaded.parity), "nothing was compared"
        reader = open_reader(store)
        pulled = await reader.pull(1)
        assert {float(tensor[0]) for tensor in pulled.tensors.values()} == {1.0}
        reader.close()
        again = await generator.generate(request)
        assert {version for one in again.trajectories for version in one.versions if version >= 0} == {1}
        await trainer.save(str(tmp_path))
    finally:
        await generator.close()
        await trainer.close()
        shared_memory.remove(store)
    restored = TrainerHost(config, no_model, None, str(tmp_path))
    await restored.open()
    assert restored.version == 1
    await restored.close()


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stack", ["local", "ray", "monarch", "hybrid"])
def test_a_cell_with_emulated_accelerators(stack: str, no_model: str, tmp_path: Path) -> None:
    config = BenchConfig.model_validate(
        {
            "stacks": [stack],
            "modes": ["async"],
            "parts": ["matrix"],
            "emulate_accelerators": True,
            "emulated_engine": ENGINE,
            "emulated_learner": LEARNER,
            "num_generators": 2,
            "updates": 5,
            "warmup_updates": 3,
            "model": no_model,
            "lengths": LENGTHS,
            "group_size": 2,
        }
    )
    assert config.groups_per_update == 8
    (key,) = cells(config)
    assert (key.engine, key.placement, key.num_generators) == ("emulated", "emulated", 2)
    run = CellRun(key=key, seed=0, repeat=0, order=0, load_before=0.0)
    request = CellRequest(config=config, run=run, folder=str(tmp_path / "run"))
    found = asyncio.run(measure_apart("rl.bench.cell", request, CellRun, tmp_path / "child", 600.0))

    assert found.num_updates == 5
    assert min(found.update_s) >= LEARNER.update_s
    assert found.trajectories == 5 * 8 * 2
    assert found.accounting is not None
    assert found.accounting.balanced
    assert found.accounting.wasted == 0
    assert found.weights is not None
    assert found.weights.num_bytes == LEARNER.num_bytes
    assert found.fresh is found.stale is None
    assert {span.role for span in found.timeline} == {"trainer", "generator 0", "generator 1"}
    assert max(found.staleness) <= config.staleness
