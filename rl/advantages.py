"""From rewards to advantages, within one group: [n] rewards of the samples of one prompt -> [n] advantages.

`R` is the reward, n the number of samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rl.types import Group


def group_normalised(rewards: Tensor, *, scale: bool = True, epsilon: float = 1e-4) -> Tensor:
    """`(R_i - mean R) / (std R + epsilon)`; without `scale` only `R_i - mean R`.

    GRPO: DeepSeekMath, arXiv 2402.03300, section 4.1.2; without the division: Dr. GRPO, arXiv 2503.20783. The standard
    deviation is the unbiased one (n - 1). All zero where all rewards are equal, and for a single sample.
    """
    centred = rewards - rewards.mean()
    if not scale or len(rewards) < 2:
        return centred
    return centred / (rewards.std() + epsilon)


def leave_one_out(rewards: Tensor) -> Tensor:
    """`R_i - mean of the others = n / (n - 1) * (R_i - mean R)`.

    RLOO: Ahmadian et al., arXiv 2402.14740, section 3.3; Kool et al. 2019. A single sample has no baseline: its
    advantage is 0.
    """
    n = len(rewards)
    return (rewards - rewards.mean()) * (n / (n - 1) if n > 1 else 0.0)


def without_zero_variance(groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """The groups whose rewards differ, and the others, of which nothing can be learned.

    Dynamic sampling: DAPO, arXiv 2503.14476, section 3.2.
    """
    return [group for group in groups if group.informative], [group for group in groups if not group.informative]


def rewards_of(group: Group) -> Tensor:
    """[n] in the order of the samples, float32."""
    return torch.tensor(group.rewards, dtype=torch.float32)
