"""Losses, advantages and statistics against hand computations."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from rl.advantages import group_normalised, leave_one_out, rewards_of, without_zero_variance
from rl.loss import (
    cispo,
    decoupled_ppo,
    entropy,
    grpo,
    k3,
    reinforce,
    rloo,
    selected_logprobs,
    token_weights,
    truncated_importance_sampling,
)
from rl.loss_settings import LossName, LossSettings
from rl.objective import Tokens, advantages, statistics, token_losses, token_sums
from rl.types import Group, Prompt, Task, Trajectory
from rl.zorplex import open_task

LOSSES: tuple[LossName, ...] = get_args(LossName)


def logs(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def trained(*probabilities: float) -> Tensor:
    return logs(*probabilities).requires_grad_()


def gradient(losses: Tensor, logprobs: Tensor) -> list[float]:
    (found,) = torch.autograd.grad(losses.sum(), logprobs)
    return [float(number) for number in found.flatten()]


def near(*numbers: float) -> object:
    return pytest.approx(numbers, rel=1e-9, abs=1e-12)


# Ratios 2, 1/2, 1.1, 0.9 of the trainer to the sampler, and advantages of either sign.
NOW, THEN = (0.4, 0.2, 0.55, 0.45), (0.2, 0.4, 0.5, 0.5)
UP, DOWN = torch.ones(4, dtype=torch.float64), -torch.ones(4, dtype=torch.float64)


def test_reinforce_weighs_the_logprob_with_the_advantage() -> None:
    logprobs, scores = trained(0.5, 0.25), torch.tensor([2.0, -1.0], dtype=torch.float64)
    losses = reinforce(logprobs, scores)
    assert losses.tolist() == near(2 * math.log(2), -math.log(4))
    assert gradient(losses, logprobs) == near(-2.0, 1.0)


def test_rloo_takes_the_other_samples_as_baseline() -> None:
    scores = leave_one_out(torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64))
    assert scores.tolist() == near(1 - 0.25, 0 - 0.75, 0.5 - 0.5)
    logprobs = trained(0.5, 0.5, 0.5)
    losses = rloo(logprobs, scores)
    assert losses.tolist() == near(0.75 * math.log(2), -0.75 * math.log(2), 0.0)
    assert gradient(losses, logprobs) == near(-0.75, 0.75, 0.0)


def test_grpo_takes_no_gradient_from_beyond_the_clip() -> None:
    logprobs = trained(*NOW)
    losses = grpo(logprobs, logs(*THEN), UP)
    assert losses.tolist() == near(-1.2, -0.5, -1.1, -0.9)
    assert gradient(losses, logprobs) == near(0.0, -0.5, -1.1, -0.9)
    losses = grpo(logprobs, logs(*THEN), DOWN)
    assert losses.tolist() == near(2.0, 0.8, 1.1, 0.9)
    assert gradient(losses, logprobs) == near(2.0, 0.0, 1.1, 0.9)
    assert grpo(logprobs, logs(*THEN), UP, clip_high=0.5).tolist()[0] == pytest.approx(-1.5)


def test_truncated_importance_sampling_caps_the_weight_and_not_the_gradient() -> None:
    logprobs = trained(*NOW)
    losses = truncated_importance_sampling(logprobs, logs(*THEN), UP, cap=1.5)
    assert losses.tolist() == near(
        -1.5 * math.log(0.4), -0.5 * math.log(0.2), -1.1 * math.log(0.55), -0.9 * math.log(0.45)
    )
    assert gradient(losses, logprobs) == near(-1.5, -0.5, -1.1, -0.9)


def test_decoupled_ppo_clips_against_the_proximal_policy() -> None:
    # Ratios to the proximal policy 2, 1, 1.1, 1; weights of the proximal policy 1, 1/2, 1, 8 (capped at 5).
    logprobs, proximal, behaviour = trained(0.4, 0.2, 0.55, 0.8), logs(0.2, 0.2, 0.5, 0.8), logs(0.2, 0.4, 0.5, 0.1)
    losses = decoupled_ppo(logprobs, behaviour, proximal, UP)
    assert losses.tolist() == near(-1.2, -0.5, -1.1, -5.0)
    assert gradient(losses, logprobs) == near(0.0, -0.5, -1.1, -5.0)
    on_policy = decoupled_ppo(logprobs, behaviour, behaviour, DOWN)
    assert on_policy.tolist() == near(*grpo(logprobs, behaviour, DOWN).tolist())


def test_cispo_clips_the_weight_and_keeps_every_gradient() -> None:
    logprobs = trained(*NOW)
    losses = cispo(logprobs, logs(*THEN), UP, clip_low=0.4, clip_high=0.5)
    assert gradient(losses, logprobs) == near(-1.5, -0.6, -1.1, -0.9)
    assert losses.tolist()[0] == pytest.approx(-1.5 * math.log(0.4))
    assert gradient(cispo(logprobs, logs(*THEN), UP), logprobs) == near(-2.0, -0.5, -1.1, -0.9)


def test_k3_is_never_negative_and_in_the_mean_the_divergence() -> None:
    assert k3(logs(0.5, 0.2), logs(0.25, 0.4)).tolist() == near(0.5 - 1 + math.log(2), 2 - 1 - math.log(2))
    p, q = logs(0.7, 0.2, 0.1), logs(0.4, 0.4, 0.2)
    assert float((p.exp() * k3(p, q)).sum()) == pytest.approx(float((p.exp() * (p - q)).sum()))
    logprobs = trained(0.5)
    assert gradient(k3(logprobs, logs(0.25)), logprobs) == near(1 - 0.5)


def test_group_normalised_advantages() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    deviation = math.sqrt(4 * 0.25 / 3)
    wanted = 0.5 / (deviation + 1e-4)
    assert group_normalised(rewards).tolist() == pytest.approx([wanted, -wanted, -wanted, wanted])
    assert group_normalised(rewards, scale=False).tolist() == [0.5, -0.5, -0.5, 0.5]


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=8))
def test_advantages_of_a_group_add_up_to_nothing(rewards: list[float]) -> None:
    numbers = torch.tensor(rewards, dtype=torch.float64)
    for found in (group_normalised(numbers), group_normalised(numbers, scale=False), leave_one_out(numbers)):
        assert found.shape == numbers.shape
        assert float(found.sum()) == pytest.approx(0.0, abs=1e-9)
        assert torch.isfinite(found).all()
    if len(rewards) > 1:
        others = [(sum(rewards) - own) / (len(rewards) - 1) for own in rewards]
        wanted = [own - other for own, other in zip(rewards, others, strict=True)]
        assert leave_one_out(numbers).tolist() == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("rewards", [[0.3, 0.3, 0.3], [1.0]])
def test_equal_rewards_have_no_advantage(rewards: list[float]) -> None:
    for name in ("group_centred", "group_normalised", "leave_one_out"):
        assert advantages(name, torch.tensor(rewards)).tolist() == [0.0] * len(rewards)
    assert advantages("reward", torch.tensor(rewards)).tolist() == torch.tensor(rewards).tolist()


def group_with(*rewards: float) -> Group:
    prompt: Prompt = next(open_task(Task(name="simple"), 1).prompts())
    plain = Trajectory(
        prompt=prompt,
        group_id="g",
        sample=0,
        token_ids=(1,),
        loss_mask=(True,),
        logprobs=(0.0,),
        versions=(0,),
        turns=(),
        stop_reason="answer",
        answer=1,
        failure_mode="wrong_answer",
        reward=0.0,
    )
    return Group(
        id="g",
        prompt=prompt,
        trajectories=tuple(
            plain.model_copy(update={"reward": reward, "sample": n}) for n, reward in enumerate(rewards)
        ),
    )


def test_groups_of_equal_rewards_are_filtered_and_can_be_counted() -> None:
    groups = [group_with(1, 0), group_with(0, 0), group_with(0.2, 0.2, 0.2), group_with(0.2, 1.2)]
    kept, dropped = without_zero_variance(groups)
    assert (kept, dropped) == ([groups[0], groups[3]], [groups[1], groups[2]])
    assert rewards_of(groups[3]).tolist() == pytest.approx([0.2, 1.2])


def test_logprobs_and_entropy_of_logits() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), math.log(4.0)]])
    assert selected_logprobs(logits, torch.tensor([1, 0])).tolist() == pytest.approx([math.log(0.75), math.log(0.5)])
    assert entropy(logits).tolist() == pytest.approx([-0.75 * math.log(0.75) - 0.25 * math.log(0.25), math.log(2)])
    cold = selected_logprobs(logits, torch.tensor([1, 0]), temperature=0.5)
    assert cold.tolist() == pytest.approx([math.log(0.9), math.log(0.5)])
    assert entropy(logits, temperature=0.5).tolist()[0] == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    assert selected_logprobs(logits.bfloat16(), torch.tensor([1, 0])).dtype == torch.float32


def test_what_counts_the_same() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    quarter = [[0.25] * 3, [0.25, 0.0, 0.0], [0.0] * 3]
    assert token_weights(mask, "token").tolist() == quarter
    assert token_weights(mask, "sequence").flatten().tolist() == pytest.approx([1 / 6] * 3 + [1 / 2] + [0] * 5)
    assert token_weights(mask, "sum").tolist() == [[0.5] * 3, [0.5, 0.0, 0.0], [0.0] * 3]
    assert token_weights(torch.zeros(2, 2, dtype=torch.bool), "token").sum() == 0


def batch(seed: int = 0, rows: int = 4, length: int = 6) -> tuple[Tensor, Tokens]:
    random = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return torch.randn(rows, length, generator=random, dtype=torch.float64) * scale

    logprobs = (noise(1.0) - 2).clamp(max=-0.1).requires_grad_()
    near_by = [logprobs.detach() + noise(0.3) for _ in range(3)]
    mask = torch.rand(rows, length, generator=random) < 0.7
    return logprobs, Tokens(logprobs, near_by[0], noise(1.0), mask, proximal=near_by[1], reference=near_by[2])


def part_of(tokens: Tokens, rows: slice) -> Tokens:
    return Tokens(**{name: tensor[rows] for name, tensor in vars(tokens).items()})


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up_to_the_batch(name: LossName) -> None:
    settings = LossSettings(name=name, kl_coefficient=0.1)
    logprobs, tokens = batch()
    weights = token_weights(tokens.mask, settings.mean)
    entropies = tokens.logprobs.detach().neg()
    whole = (weights * token_losses(settings, tokens)).sum()
    parts = [slice(0, 1), slice(1, 4)]
    added = sum((weights[rows] * token_losses(settings, part_of(tokens, rows))).sum() for rows in parts)
    assert gradient(torch.as_tensor(added), logprobs) == pytest.approx(gradient(whole, logprobs))
    sums = token_sums(settings, tokens, entropies)
    of_parts = [token_sums(settings, part_of(tokens, rows), entropies[rows]) for rows in parts]
    assert torch.stack(of_parts).sum(0).tolist() == pytest.approx(sums.tolist())


@pytest.mark.parametrize("name", LOSSES)
def test_a_masked_token_has_no_loss_and_no_gradient(name: LossName) -> None:
    logprobs, tokens = batch()
    broken = Tokens(**{**vars(tokens), "behaviour": tokens.behaviour.masked_fill(~tokens.mask, -math.inf)})
    losses = token_losses(LossSettings(name=name), broken)
    assert losses[~tokens.mask].abs().sum() == 0
    (found,) = torch.autograd.grad(losses.sum(), logprobs)
    assert found[~tokens.mask].abs().sum() == 0 and torch.isfinite(found).all()


@pytest.mark.parametrize("name", LOSSES)
def test_on_policy_all_losses_follow_the_policy_gradient(name: LossName) -> None:
    logprobs, tokens = batch()
    here = tokens.logprobs.detach()
    on_policy = Tokens(tokens.logprobs, here, tokens.advantages, tokens.mask, proximal=here)
    settings = LossSettings(name=name)
    (found,) = torch.autograd.grad(token_losses(settings, on_policy).sum(), logprobs)
    assert torch.allclose(found, torch.where(tokens.mask, -tokens.advantages, 0.0))
    told = statistics(token_sums(settings, on_policy, here.neg()))
    assert (told.effective_sample_size, told.k3_kl, told.clip_fraction) == (pytest.approx(1.0), 0.0, 0.0)


def test_statistics_of_a_batch() -> None:
    tokens = Tokens(logs(*NOW), logs(*THEN), UP, torch.tensor([True, True, True, False]), reference=logs(*THEN))
    told = statistics(token_sums(LossSettings(name="grpo"), tokens, torch.tensor([1.0, 2.0, 3.0, 9.0])))
    ratios = (2.0, 0.5, 1.1)
    assert told.num_tokens == 3
    assert told.effective_sample_size == pytest.approx(sum(ratios) ** 2 / (3 * sum(ratio**2 for ratio in ratios)))
    assert told.k3_kl == pytest.approx(sum(ratio - 1 - math.log(ratio) for ratio in ratios) / 3)
    assert told.reference_kl == pytest.approx(sum(1 / ratio - 1 + math.log(ratio) for ratio in ratios) / 3)
    assert told.clip_fraction == pytest.approx(1 / 3)
    assert told.entropy == pytest.approx(2.0)
    nothing = Tokens(logs(0.5), logs(0.5), torch.ones(1), torch.tensor([False]))
    assert statistics(token_sums(LossSettings(name="grpo"), nothing, torch.ones(1))).num_tokens == 0


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        (LossSettings(name="reinforce"), 0.0),
        (LossSettings(name="rloo"), 0.0),
        (LossSettings(name="truncated_is", cap=1.05), 0.5),
        (LossSettings(name="cispo", clip_low=0.2, clip_high=0.2), 0.5),
        (LossSettings(name="grpo"), 0.25),
        (LossSettings(name="decoupled_ppo"), 0.0),
        (LossSettings(name="decoupled_ppo", cap=1.05), 0.5),
    ],
)
def test_what_counts_as_clipped(settings: LossSettings, share: float) -> None:
    tokens = Tokens(logs(*NOW), logs(*THEN), UP, torch.ones(4, dtype=torch.bool), proximal=logs(*NOW))
    assert statistics(token_sums(settings, tokens, UP)).clip_fraction == share


def test_the_kl_penalty_is_added() -> None:
    tokens = Tokens(trained(0.5), logs(0.5), torch.zeros(1), torch.tensor([True]), reference=logs(0.25))
    losses = token_losses(LossSettings(name="grpo", kl_coefficient=0.1), tokens)
    assert losses.tolist() == near(0.1 * (0.5 - 1 + math.log(2)))


def test_a_loss_says_what_it_is_missing() -> None:
    tokens = Tokens(trained(0.5), logs(0.5), torch.zeros(1), torch.tensor([True]))
    with pytest.raises(ValueError, match="this loss wants the log-probabilities `proximal`, got none"):
        token_losses(LossSettings(name="decoupled_ppo"), tokens)
    with pytest.raises(ValueError, match="this loss wants the log-probabilities `reference`, got none"):
        token_losses(LossSettings(name="grpo", kl_coefficient=1), tokens)


def test_settings_know_what_is_usual_for_a_loss() -> None:
    assert LossSettings() == LossSettings(name="decoupled_ppo")
    found = LossSettings(name="rloo")
    assert (found.advantage, found.mean) == ("leave_one_out", "sum")
    assert LossSettings(name="cispo").clip_high == 4.0 and LossSettings(name="grpo").clip_high == 0.2
    assert LossSettings(name="grpo", mean="token").mean == "token"
    assert LossSettings.model_validate_json(found.model_dump_json()) == found
    with pytest.raises(ValidationError, match="Input should be 'reinforce'"):
        LossSettings.model_validate({"name": "gpro"})
