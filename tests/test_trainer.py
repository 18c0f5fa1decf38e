"""The trainer as a stack hosts it: updates, publications that readers agree with, saves, an end without leftovers."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from rl.config import EngineConfig, LearnerConfig, RunConfig
from rl.models import load_model, save_model
from rl.prompts import PromptSet
from rl.rollout import RolloutSettings, rollout
from rl.scripted import RandomEngine, ScriptedEngine
from rl.stack import PartLost
from rl.tokenizer import TinyTokenizer
from rl.trainer import TrainerHost
from rl.transports import shared_memory
from rl.types import Batch, Group, Task
from rl.weights import WeightStoreHandle, largest_difference, open_reader, probe_tokens

TOKENIZER = TinyTokenizer()
SETTINGS = RolloutSettings(prompt_style="brief", max_tokens=160, max_tokens_per_turn=20)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One layer of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = str(tmp_path_factory.mktemp("model"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=TOKENIZER.eos_token_id,
        pad_token_id=TOKENIZER.pad_token_id,
    )
    save_model(LlamaForCausalLM(config), TOKENIZER, folder)
    return folder


@pytest.fixture
def store() -> Iterator[WeightStoreHandle]:
    handle = shared_memory.create()
    yield handle
    shared_memory.remove(handle)


async def batch_of(version: int) -> Batch:
    prompt = PromptSet([Task(name="simple")], "train", 0)[version]
    engines = [ScriptedEngine(TOKENIZER), RandomEngine(TOKENIZER), RandomEngine(TOKENIZER)]
    samples = [
        await rollout(engine, TOKENIZER, prompt, SETTINGS, group_id=prompt.id, sample=sample, seed=sample)
        for sample, engine in enumerate(engines)
    ]
    group = Group(id=prompt.id, prompt=prompt, trajectories=tuple(samples))
    return Batch(update=version, version=version, groups=(group,))


def config_of(**learner: Any) -> RunConfig:
    settings = LearnerConfig(**{"learning_rate": 1e-2, **learner})
    return RunConfig(learner=settings, rollout=SETTINGS, engine=EngineConfig(name="hf"))


async def pulled_model(store: WeightStoreHandle, model_folder: str, version: int) -> tuple[Any, Any]:
    """A model with the weights that a generator pulls, and their header."""
    reader = open_reader(store)
    pulled = await reader.pull(version)
    model: Any = load_model(model_folder)
    left = model.load_state_dict({name: tensor.clone() for name, tensor in pulled.tensors.items()}, strict=False)
    assert set(left.missing_keys) <= {"lm_head.weight"}
    assert not left.unexpected_keys
    pulled.check()
    header = pulled.header
    del pulled
    reader.close()
    return model, header


def scores(model: Any) -> list[float]:
    tokens = torch.tensor(probe_tokens(TOKENIZER))
    with torch.no_grad():
        table = model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
    found: list[float] = table.gather(-1, tokens[1:, None])[:, 0].tolist()
    return found


@pytest.mark.parametrize("learner", [{}, {"num_processes": 2, "fully_sharded": True}], ids=["one", "sharded"])
async def test_what_is_published_is_what_the_trainer_has(
    model_folder: str, store: WeightStoreHandle, learner: dict[str, Any]
) -> None:
    trainer = TrainerHost(config_of(**learner), model_folder, store)
    try:
        await trainer.open()
        metrics = await trainer.update(await batch_of(0))
        assert metrics.finite
        assert metrics.version == trainer.version == 1
        published = await trainer.publish()
    finally:
        await trainer.close()
    assert published.version == 1
    model, header = await pulled_model(store, model_folder, 1)
    assert header.version == 1
    assert largest_difference(header.probe, scores(model)) < 1e-5
    assert largest_difference(header.probe, scores(load_model(model_folder))) > 1e-3
    assert published.num_bytes >= sum(each.nbytes for each in model.parameters())
    assert published.snapshot_s > 0


async def test_an_update_runs_beside_the_push_and_does_not_change_what_is_pushed(
    model_folder: str, store: WeightStoreHandle
) -> None:
    trainer = TrainerHost(config_of(), model_folder, store)
    try:
        await trainer.open()
        await trainer.update(await batch_of(0))
        publication = asyncio.create_task(trainer.publish())
        await asyncio.sleep(0)
        second, published = await asyncio.gather(trainer.update(await batch_of(1)), publication)
        assert second.version == 2
        assert published.version in (1, 2)
        model, header = await pulled_model(store, model_folder, published.version)
        assert largest_difference(header.probe, scores(model)) < 1e-5
        publications = await asyncio.gather(trainer.publish(), trainer.publish())
        assert [each.version for each in publications] == [2, 2]
    finally:
        await trainer.close()


async def test_a_trainer_goes_on_from_a_save_with_the_version_it_had(
    model_folder: str, store: WeightStoreHandle, tmp_path: Path
) -> None:
    first = TrainerHost(config_of(), model_folder, store)
    try:
        await first.open()
        await first.update(await batch_of(0))
        await first.save(str(tmp_path))
        expected = await first.update(await batch_of(1))
    finally:
        await first.close()
    second = TrainerHost(config_of(), model_folder, store, str(tmp_path))
    try:
        await second.open()
        assert second.version == 1
        assert (await second.publish()).version == 1
        found = await second.update(await batch_of(1))
    finally:
        await second.close()
    assert found.model_dump(exclude={"duration_s"}) == expected.model_dump(exclude={"duration_s"})


async def test_a_process_that_dies_is_told_and_none_is_left(model_folder: str, store: WeightStoreHandle) -> None:
    trainer = TrainerHost(config_of(num_processes=2), model_folder, store)
    before = set(psutil.Process().children())
    try:
        await trainer.open()
        (child,) = set(psutil.Process().children()) - before
        assert (await trainer.update(await batch_of(0))).finite
        assert (await trainer.publish()).version == 1
        child.kill()
        with pytest.raises(PartLost, match="learner process 1"):
            await trainer.update(await batch_of(1))
    finally:
        await trainer.close()
    assert set(psutil.Process().children()) <= before


async def test_closing_twice_or_before_opening_is_fine(model_folder: str) -> None:
    trainer = TrainerHost(config_of(), model_folder)
    await trainer.close()
    other = TrainerHost(config_of(), model_folder)
    await other.open()
    await other.close()
    await other.close()


def test_a_learner_that_its_stack_cannot_host_is_refused() -> None:
    with pytest.raises(ValueError, match="`trainer_gpus` is 1, fewer than the 2 processes"):
        RunConfig(learner=LearnerConfig(num_processes=2), trainer_gpus=1)
