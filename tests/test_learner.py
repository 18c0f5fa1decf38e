"""The learner: its gradient is the loss's own, however the batch is cut and by how many processes it is done."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rl.batching import micro_batches
from rl.config import EngineConfig, LearnerConfig, RunConfig
from rl.learner import Learner
from rl.learner_processes import LearnerProcesses
from rl.loss import k3, selected_logprobs
from rl.loss_settings import LossSettings
from rl.models import load_model, save_model
from rl.prompts import PromptSet
from rl.rollout import RolloutSettings, rollout
from rl.scripted import RandomEngine, ScriptedEngine
from rl.tokenizer import TinyTokenizer
from rl.types import Batch, Group, Task, TrainMetrics

TOKENIZER = TinyTokenizer()
EPSILON = 1e-4
"""Of normalised advantages."""
SETTINGS = RolloutSettings(prompt_style="brief", max_tokens=160, max_tokens_per_turn=20)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two layers of random weights, head and embedding tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = str(tmp_path_factory.mktemp("model"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=TOKENIZER.eos_token_id,
        pad_token_id=TOKENIZER.pad_token_id,
    )
    save_model(LlamaForCausalLM(config), TOKENIZER, folder)
    return folder


def batch_of(number: int = 0, num_groups: int = 2, version: int = 0) -> Batch:
    """Groups of two samples of the oracle, right and with the tools, and one of dice, wrong."""

    async def groups() -> list[Group]:
        prompts = PromptSet([Task(name="compositional")], "train", number)
        engines = [ScriptedEngine(TOKENIZER), ScriptedEngine(TOKENIZER), RandomEngine(TOKENIZER)]
        found = []
        for place in range(num_groups):
            prompt = prompts[place]
            samples = [
                await rollout(engine, TOKENIZER, prompt, SETTINGS, group_id=prompt.id, sample=sample, seed=sample)
                for sample, engine in enumerate(engines)
            ]
            found.append(Group(id=prompt.id, prompt=prompt, trajectories=tuple(samples)))
        return found

    return Batch(update=version, version=version, groups=tuple(asyncio.run(groups())))


def config_of(**learner: Any) -> RunConfig:
    gpus = learner.pop("gpus", 0)
    settings = LearnerConfig(**{"learning_rate": 1e-2, **learner})
    return RunConfig(learner=settings, rollout=SETTINGS, engine=EngineConfig(name="hf"), trainer_gpus=gpus)


def same_weights(one: Learner, other: Learner) -> bool:
    mine, theirs = one.state(), other.state()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference, as a share of the largest value."""
    assert one.keys() == other.keys()
    largest = max(float(tensor.abs().max()) for tensor in one.values())
    return max(float((one[name] - other[name]).abs().max()) for name in one) / largest


def numbers(metrics: TrainMetrics) -> dict[str, Any]:
    """Flat; the largest differences are of another order than the means, and as uncertain as their tokens."""
    flat = metrics.model_dump(exclude={"duration_s", "fresh", "stale"})
    for kind in ("fresh", "stale"):
        of_kind = getattr(metrics, kind)
        if of_kind is not None:
            flat |= {f"{kind}/{name}": value for name, value in of_kind.model_dump().items()}
    return flat


def by_hand(model_folder: str, batch: Batch, settings: LossSettings, reference_folder: str) -> tuple[float, Any]:
    """Loss and gradient, one conversation and one token at a time; truncated importance sampling, mean over tokens."""
    model: Any = load_model(model_folder)
    reference: Any = load_model(reference_folder)
    total = torch.zeros(())
    count = 0
    for group in batch.groups:
        rewards = torch.tensor(group.rewards)
        scores = (rewards - rewards.mean()) / (rewards.std() + EPSILON)
        for trajectory, score in zip(group.trajectories, scores, strict=True):
            ids = torch.tensor([trajectory.token_ids])
            table = model(input_ids=ids).logits[0].log_softmax(-1)
            with torch.no_grad():
                old = reference(input_ids=ids).logits[0].log_softmax(-1)
            for place, token in enumerate(trajectory.token_ids):
                if trajectory.loss_mask[place]:
                    logprob = table[place - 1, token]
                    weight = (logprob.detach() - trajectory.logprobs[place]).exp().clamp(max=settings.cap)
                    penalty = settings.kl_coefficient * k3(logprob, old[place - 1, token])
                    total = total - weight * score * logprob + penalty
                    count += 1
    torch.autograd.backward(total / count)
    return float(total.detach()) / count, {name: each.grad for name, each in model.named_parameters()}


def test_loss_and_gradient_are_those_computed_by_hand(model_folder: str, tmp_path: Path) -> None:
    settings = LossSettings(name="truncated_is", kl_coefficient=0.5)
    config = config_of(loss=settings, max_gradient_norm=1e9)
    learner = Learner(config, model_folder)
    learner.update(batch_of(1))
    learner.save(str(tmp_path))

    batch = batch_of(2, version=1)
    loss, gradient = by_hand(str(tmp_path), batch, settings, reference_folder=model_folder)
    metrics = learner.update(batch)
    assert metrics.loss == pytest.approx(loss, rel=1e-4)
    assert difference(learner.gradients(), gradient) < 1e-4
    norm = torch.stack([each.norm() for each in gradient.values()]).norm()
    assert metrics.gradient_norm == pytest.approx(float(norm), rel=1e-4)
    assert metrics.reference_kl > 0
    assert metrics.num_tokens == sum(group.num_sampled for group in batch.groups)


def test_what_was_right_becomes_likelier_and_the_loss_falls(model_folder: str) -> None:
    batch = batch_of(3)
    learner = Learner(config_of(loss=LossSettings(name="rloo"), max_gradient_norm=1.0), model_folder)

    def likelihood(wanted_mode: bool) -> float:
        found = [
            torch.tensor(learner.logprobs(each.token_ids))[torch.tensor(each.loss_mask[1:])].mean()
            for each in batch.trajectories
            if (each.failure_mode == "success") == wanted_mode
        ]
        return float(torch.stack(found).mean())

    right, wrong = likelihood(True), likelihood(False)
    losses = [learner.update(batch.model_copy(update={"version": number})).loss for number in range(8)]
    assert losses[-1] < losses[0]
    assert likelihood(True) > right + 0.5
    assert likelihood(False) < wrong
    assert learner.version == 8


@pytest.mark.parametrize("mean", ["token", "sequence", "sum"])
def test_cutting_the_batch_does_not_change_the_update(model_folder: str, mean: str) -> None:
    batch = batch_of(4)
    loss = LossSettings.model_validate({"name": "grpo", "mean": mean})
    whole = Learner(config_of(loss=loss, micro_batch_tokens=100_000), model_folder)
    cut = Learner(config_of(loss=loss, micro_batch_tokens=16), model_folder)
    one, other = whole.update(batch), cut.update(batch)
    assert difference(whole.gradients(), cut.gradients()) < 1e-5
    for name, value in numbers(one).items():
        assert numbers(other)[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("max_tokens", [16, 150, 400, 100_000])
@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_every_trained_token_is_in_one_micro_batch(max_tokens: int, num_parts: int) -> None:
    batch = batch_of(5, num_groups=3)
    settings = LossSettings()
    parts = micro_batches(batch, settings, max_tokens, num_parts)
    assert len(parts) == num_parts
    assert all(parts), "with nine conversations, no process is idle"
    found = sorted(
        tuple(micro.token_ids[row][micro.mask[row]].tolist())
        for part in parts
        for micro in part
        for row in range(len(micro.token_ids))
    )
    expected = sorted(
        tuple(token for token, kept in zip(each.token_ids, each.loss_mask, strict=True) if kept)
        for each in batch.trajectories
    )
    assert found == expected
    for part in parts:
        for micro in part:
            assert micro.num_tokens <= max_tokens or len(micro.token_ids) == 1
    total = sum(float(micro.weights.sum()) for part in parts for micro in part)
    assert total == pytest.approx(1)


def test_a_save_is_a_model_and_goes_on_to_the_bit(model_folder: str, tmp_path: Path) -> None:
    config = config_of(warmup_updates=4, weight_decay=0.1)
    learner = Learner(config, model_folder)
    batches = [batch_of(6 + number, version=number) for number in range(4)]
    for batch in batches[:2]:
        learner.update(batch)
    learner.save(str(tmp_path))
    restored = Learner(config, model_folder, str(tmp_path))
    assert restored.version == 2
    assert same_weights(learner, restored)
    for batch in batches[2:]:
        assert numbers(learner.update(batch)) == numbers(restored.update(batch))
    assert same_weights(learner, restored)
    fresh = Learner(config, model_folder)
    assert not same_weights(fresh, restored)
    assert Learner(config, str(tmp_path)).version == 0, "as a model alone it is a beginning"


def test_the_learning_rate_warms_up_and_the_gradient_is_clipped(model_folder: str) -> None:
    learner = Learner(config_of(warmup_updates=4, max_gradient_norm=1e-3), model_folder)
    rates = [learner.update(batch_of(number, version=number)).learning_rate for number in range(6)]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    norm = torch.stack([each.norm() for each in learner.gradients().values()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-2)


def test_an_update_that_is_no_number_leaves_the_weights(model_folder: str) -> None:
    batch = batch_of(7)
    group = batch.groups[0]
    broken = group.trajectories[0].model_copy(update={"reward": float("nan")})
    broken_group = group.model_copy(update={"trajectories": (broken, *group.trajectories[1:])})
    learner = Learner(config_of(), model_folder)
    metrics = learner.update(batch.model_copy(update={"groups": (broken_group,)}))
    assert not metrics.finite
    assert same_weights(learner, Learner(config_of(), model_folder))


def test_the_same_batches_give_the_same_numbers_to_the_bit(model_folder: str) -> None:
    runs = []
    for _ in range(2):
        learner = Learner(config_of(micro_batch_tokens=300), model_folder)
        runs.append([numbers(learner.update(batch_of(number, version=number))) for number in range(3)])
    assert runs[0] == runs[1]


def test_weights_are_published_under_the_names_of_the_checkpoint(model_folder: str) -> None:
    learner = Learner(config_of(), model_folder)
    names = {entry.name for entry in learner.manifest.entries}
    assert learner.state().keys() == names
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names, "tied"
    ids = torch.tensor([[1, 2, 3, 4]])
    model: Any = load_model(model_folder)
    expected = selected_logprobs(model(input_ids=ids).logits[0, :-1], ids[0, 1:])
    assert learner.logprobs(ids[0].tolist()) == pytest.approx(expected.tolist(), rel=1e-4)


def updated(config: RunConfig, model_folder: str, folder: str, batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """Metrics of some updates, whose weights are saved to `folder`."""
    Path(folder).mkdir()
    processes = LearnerProcesses(config, model_folder)
    try:
        metrics = [numbers(processes.together("update", batch)) for batch in batches]
        processes.together("save", folder)
    finally:
        processes.close()
    return metrics


@pytest.mark.parametrize("fully_sharded", [False, True])
def test_two_processes_make_the_update_of_one(model_folder: str, tmp_path: Path, fully_sharded: bool) -> None:
    batches = [batch_of(8 + number, version=number) for number in range(2)]
    loss = LossSettings(kl_coefficient=0.1)
    # Adam turns the sign of a gradient that is as good as zero into a whole step, so steps are small.
    alone = config_of(loss=loss, learning_rate=1e-4)
    pair = config_of(
        loss=loss, learning_rate=1e-4, num_processes=2, fully_sharded=fully_sharded, micro_batch_tokens=300
    )
    expected = updated(alone, model_folder, str(tmp_path / "alone"), batches)
    found = updated(pair, model_folder, str(tmp_path / "pair"), batches)
    for one, other in zip(expected, found, strict=True):
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    # What two have saved, one restores, and goes on from there.
    restored = Learner(alone, model_folder, str(tmp_path / "pair"))
    single = Learner(alone, model_folder, str(tmp_path / "alone"))
    assert difference(restored.state(), single.state()) < 1e-3
    following = batch_of(20, version=2)
    assert restored.update(following).loss == pytest.approx(single.update(following).loss, rel=1e-3, abs=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("gpus", "fully_sharded"), [(1, False), (2, False), (2, True)])
def test_gpus_make_the_update_of_a_cpu(model_folder: str, tmp_path: Path, gpus: int, fully_sharded: bool) -> None:
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    batches = [batch_of(8 + number, version=number) for number in range(2)]
    on_gpus = config_of(learning_rate=1e-4, num_processes=gpus, fully_sharded=fully_sharded, gpus=gpus)
    expected = updated(config_of(learning_rate=1e-4), model_folder, str(tmp_path / "cpu"), batches)
    found = updated(on_gpus, model_folder, str(tmp_path / "gpus"), batches)
    for one, other in zip(expected, found, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-2, abs=1e-4)
        assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-2)
