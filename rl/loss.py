"""The objectives: pure functions of log-probabilities, none of which knows a model, a batch or a process.

    logits -> selected_logprobs -> <objective> (a loss for each token) -> weighted by token_weights, summed -> backward

All tensors of a call have one shape, whatever it is: [B, T] padded, or [N] packed. `logprobs` are those of the weights
being trained and carry the gradient; `behaviour` those at sampling time; `proximal` those of the trainer's weights
before the update; `reference` those of a frozen model. A = advantage of the token's trajectory,
r = exp(logprobs - behaviour), sg = no gradient. What an objective returns is minimised.

The mean over tokens or sequences is not taken here: `token_weights` are made once for the whole batch, so that a loss
summed over micro-batches, packed rows or processes is the loss of the batch.
"""

from typing import Literal

import torch
from torch import Tensor

Mean = Literal["token", "sequence", "sum"]


def selected_logprobs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """[...] log-probabilities of `token_ids` [...] under `logits` [..., V], at the temperature that was sampled with.

    In float32 at least. `logits[..., t, :]` must be those that predict `token_ids[..., t]`.
    """
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    chosen = scaled.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return chosen - scaled.logsumexp(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """[...] entropy in nats of the distribution that `logits` [..., V] give."""
    logprobs = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def token_weights(mask: Tensor, mean: Mean) -> Tensor:
    """[B, T] the weight of every token in the loss of a batch, 0 where the mask is.

    `token`: all trained tokens count the same (DAPO, arXiv 2503.14476, section 3.3). `sequence`: all sequences count
    the same, a token by the length of its own (GRPO, arXiv 2402.03300, equation 3). `sum`: the sum over a sequence,
    then the mean over sequences, which is the policy gradient itself (RLOO, arXiv 2402.14740; Dr. GRPO).
    """
    kept = mask.to(torch.float32)
    lengths = kept.sum(-1, keepdim=True)
    if mean == "token":
        return kept / lengths.sum().clamp(min=1)
    sequences = (lengths > 0).sum().clamp(min=1)
    return kept / sequences if mean == "sum" else kept / lengths.clamp(min=1) / sequences


def reinforce(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """`-A log p`. Williams 1992, "Simple statistical gradient-following algorithms", theorem 1."""
    return -advantages * logprobs


def rloo(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """`-A log p` with A from `advantages.leave_one_out` and the mean `sum`: the other samples are the baseline.

    Ahmadian et al., arXiv 2402.14740, equation 6.
    """
    return reinforce(logprobs, advantages)


def grpo(
    logprobs: Tensor, behaviour: Tensor, advantages: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """`-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`.

    PPO's clipped surrogate, arXiv 1707.06347, equation 7, as in GRPO, arXiv 2402.03300, equation 3; two bounds: DAPO's
    clip-higher, arXiv 2503.14476. For GRPO itself take `advantages.group_normalised` and the mean `sequence`.
    """
    return _clipped(logprobs - behaviour, advantages, clip_low, clip_high)


def truncated_importance_sampling(
    logprobs: Tensor, behaviour: Tensor, advantages: Tensor, *, cap: float = 2.0
) -> Tensor:
    """`-sg(min(r, cap)) A log p`.

    IMPALA's truncated weight, arXiv 1802.01561, section 4.1; for a sampler that is not the trainer: Yao et al. 2025,
    "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    """
    ratio = (logprobs.detach() - behaviour).exp().clamp(max=cap)
    return -ratio * advantages * logprobs


def decoupled_ppo(
    logprobs: Tensor,
    behaviour: Tensor,
    proximal: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    cap: float = 5.0,
) -> Tensor:
    """`-w min(u A, clip(u, 1 - clip_low, 1 + clip_high) A)` with `u = exp(logprobs - proximal)` and
    `w = min(exp(proximal - behaviour), cap)`.

    Clips the change of this update, not the age of the sample: Hilton et al., arXiv 2110.00641, section 3; for
    asynchronous RL: AReaL, arXiv 2505.24298, equation 5. The cap is that of truncated importance sampling.
    """
    weight = (proximal - behaviour).exp().clamp(max=cap)
    return weight * _clipped(logprobs - proximal, advantages, clip_low, clip_high)


def cispo(
    logprobs: Tensor, behaviour: Tensor, advantages: Tensor, *, clip_low: float = 1.0, clip_high: float = 4.0
) -> Tensor:
    """`-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log p`: the weight is clipped, the gradient of no token is lost.

    MiniMax-M1, arXiv 2506.13585, equation 4. `clip_low=1` is no lower bound, which is what the paper uses.
    """
    ratio = (logprobs.detach() - behaviour).exp().clamp(1 - clip_low, 1 + clip_high)
    return -ratio * advantages * logprobs


def k3(logprobs: Tensor, other: Tensor) -> Tensor:
    """`q / p - 1 - log(q / p)` for tokens sampled from p (`logprobs`) and q (`other`): never negative, and in the mean
    KL(p || q).

    Schulman 2020, "Approximating KL Divergence"; added to a loss it is GRPO's penalty, arXiv 2402.03300, equation 4,
    with the reference as q.
    """
    difference = other - logprobs
    return difference.expm1() - difference


def _clipped(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
