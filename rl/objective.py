"""The loss that the settings name, applied to tokens, and what is logged about it.

    LossSettings + Tokens -> token_losses [...]        Tokens -> token_sums [K] -> (added up) -> TokenStatistics

The sums of micro-batches, packed rows or processes add up to those of the batch.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rl import loss
from rl.advantages import group_normalised, leave_one_out
from rl.loss_settings import AdvantageName, LossSettings
from rl.types import Frozen, Mismatch


@dataclass(frozen=True)
class Tokens:
    """Tokens of a batch or of a part of it; all tensors have one shape."""

    logprobs: Tensor
    """Under the weights being trained; carries the gradient."""
    behaviour: Tensor
    """When the token was sampled."""
    advantages: Tensor
    mask: Tensor
    """True for tokens that are trained on."""
    proximal: Tensor | None = None
    """Under the trainer's weights before the update; wanted by `decoupled_ppo`."""
    reference: Tensor | None = None
    """Under the frozen reference model; wanted where the KL coefficient is not 0."""


class TokenStatistics(Frozen):
    """How far the trainer is from the sampler and the reference; means over the trained tokens, in nats."""

    num_tokens: int
    effective_sample_size: float
    """`(sum r)^2 / (n sum r^2)`, 1 when all weights are equal."""
    k3_kl: float
    """Estimate of KL(sampler || trainer)."""
    clip_fraction: float
    """Share of the tokens whose ratio or weight the loss clips."""
    entropy: float
    reference_kl: float
    """Estimate of KL(trainer || reference), 0 without one."""


def advantages(name: AdvantageName, rewards: Tensor) -> Tensor:
    """[n] advantages from the [n] rewards of one group."""
    match name:
        case "reward":
            return rewards
        case "group_centred":
            return group_normalised(rewards, scale=False)
        case "group_normalised":
            return group_normalised(rewards)
        case "leave_one_out":
            return leave_one_out(rewards)


def token_losses(settings: LossSettings, tokens: Tokens) -> Tensor:
    """The loss of every token, 0 where the mask is False; to be weighted by `loss.token_weights` and summed."""
    tokens = _blanked(tokens)
    losses = _policy_losses(settings, tokens)
    if settings.kl_coefficient:
        losses = losses + settings.kl_coefficient * loss.k3(tokens.logprobs, _wanted(tokens.reference, "reference"))
    return losses


def _policy_losses(settings: LossSettings, tokens: Tokens) -> Tensor:
    logprobs, behaviour, scores = tokens.logprobs, tokens.behaviour, tokens.advantages
    low, high, cap = settings.clip_low, settings.clip_high, settings.cap
    match settings.name:
        case "reinforce":
            return loss.reinforce(logprobs, scores)
        case "rloo":
            return loss.rloo(logprobs, scores)
        case "grpo":
            return loss.grpo(logprobs, behaviour, scores, clip_low=low, clip_high=high)
        case "truncated_is":
            return loss.truncated_importance_sampling(logprobs, behaviour, scores, cap=cap)
        case "cispo":
            return loss.cispo(logprobs, behaviour, scores, clip_low=low, clip_high=high)
        case "decoupled_ppo":
            proximal = _wanted(tokens.proximal, "proximal")
            return loss.decoupled_ppo(logprobs, behaviour, proximal, scores, clip_low=low, clip_high=high, cap=cap)


def token_sums(settings: LossSettings, tokens: Tokens, entropy: Tensor) -> Tensor:
    """[7] float64 sums over the trained tokens: what `statistics` needs, to be added up over parts first."""
    with torch.no_grad():
        ratio = (tokens.logprobs - tokens.behaviour).double().exp()
        to_reference = (
            torch.zeros_like(ratio) if tokens.reference is None else loss.k3(tokens.logprobs, tokens.reference)
        )
        columns = [
            torch.ones_like(ratio),
            ratio,
            ratio.square(),
            loss.k3(tokens.behaviour, tokens.logprobs),
            _clips(settings, tokens),
            entropy,
            to_reference,
        ]
        return torch.stack([torch.where(tokens.mask, column.double(), 0.0).sum() for column in columns])


def statistics(sums: Tensor) -> TokenStatistics:
    """What the added-up sums say; all 0 where no token was trained on."""
    count, ratios, squares, k3, clipped, entropy, reference = sums.tolist()
    n = max(count, 1.0)
    return TokenStatistics(
        num_tokens=int(count),
        effective_sample_size=ratios**2 / (n * squares) if squares else 0.0,
        k3_kl=k3 / n,
        clip_fraction=clipped / n,
        entropy=entropy / n,
        reference_kl=reference / n,
    )


def mismatch_sums(tokens: Tokens, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """[4] float64 sums and [1] the largest difference over the trained tokens that are chosen: what `mismatch` needs
    once the sums of all parts were added up, and the largest of all was found."""
    with torch.no_grad():
        kept = tokens.mask & chosen
        difference = torch.where(kept, tokens.logprobs - tokens.behaviour, 0.0).double()
        ratio = difference.exp()
        columns = [torch.ones_like(ratio), ratio, ratio.square(), difference.expm1() - difference]
        sums = torch.stack([torch.where(kept, column, 0.0).sum() for column in columns])
        largest = difference.abs().max() if difference.numel() else torch.zeros((), dtype=torch.float64)
        return sums, largest[None]


def mismatch(sums: Tensor, largest: float) -> Mismatch | None:
    """What the added-up sums say; None where no token was chosen."""
    count, ratios, squares, k3 = sums.tolist()
    if not count:
        return None
    return Mismatch(
        num_tokens=int(count),
        k3_kl=k3 / count,
        effective_sample_size=ratios**2 / (count * squares) if squares else 0.0,
        max_difference=largest,
    )


def _clips(settings: LossSettings, tokens: Tokens) -> Tensor:
    """1 where the loss clips: for clipped surrogates where the clip takes the gradient away, else where it binds, as
    the cap of a weight does."""
    base = _wanted(tokens.proximal, "proximal") if settings.name == "decoupled_ppo" else tokens.behaviour
    ratio = (tokens.logprobs - base).exp()
    above, below = ratio > 1 + settings.clip_high, ratio < 1 - settings.clip_low
    match settings.name:
        case "reinforce" | "rloo":
            return torch.zeros_like(ratio)
        case "truncated_is":
            return ratio > settings.cap
        case "cispo":
            return above | below
        case "grpo":
            return (above & (tokens.advantages > 0)) | (below & (tokens.advantages < 0))
        case "decoupled_ppo":
            # With one step per batch the proximal policy is the trained one, and only the cap can bind.
            capped = (base - tokens.behaviour).exp() > settings.cap
            return capped | (above & (tokens.advantages > 0)) | (below & (tokens.advantages < 0))


def _blanked(tokens: Tokens) -> Tokens:
    """0 wherever the mask is False: a mask on the loss alone lets an infinity there make every gradient NaN."""
    tensors = {name: tensor for name, tensor in vars(tokens).items() if tensor is not None}
    blanked = {name: torch.where(tokens.mask, tensor, 0.0) for name, tensor in tensors.items() if name != "mask"}
    return replace(tokens, **blanked)


def _wanted(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"this loss wants the log-probabilities `{name}`, got none")
    return tensor
