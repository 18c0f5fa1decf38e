"""A batch of conversations as padded tensors of about equal length, dealt out to processes.

    Batch -> advantages by group, weights over the batch -> rows, longest first -> micro-batches -> a part per process

The same batch gives the same micro-batches, whoever asks. A token's weight is the same in whichever micro-batch it is,
so that losses and gradients add up to those of the batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rl.advantages import rewards_of
from rl.loss import token_weights
from rl.loss_settings import LossSettings
from rl.objective import advantages
from rl.types import Batch


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the model at once; all tensors are [rows, longest], padded on the right."""

    token_ids: Tensor
    mask: Tensor
    """True for tokens that are trained on."""
    behaviour: Tensor
    advantages: Tensor
    weights: Tensor
    """Of every token in the loss of the whole batch."""
    fresh: Tensor
    """True for tokens of a group that was sampled by the weights of now."""

    @property
    def num_tokens(self) -> int:
        """Padded."""
        return self.token_ids.numel()

    def to(self, device: torch.device) -> "MicroBatch":
        """On another device."""
        return MicroBatch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class _Row:
    token_ids: Tensor
    mask: Tensor
    behaviour: Tensor
    advantages: Tensor
    weights: Tensor
    fresh: Tensor


def micro_batches(batch: Batch, settings: LossSettings, max_tokens: int, num_parts: int = 1) -> list[list[MicroBatch]]:
    """The micro-batches of each of `num_parts` processes.

    None has more than `max_tokens` padded tokens, but for a conversation that is longer by itself. Conversations
    without a token to train on are left out.
    """
    rows = sorted(_rows(batch, settings), key=lambda row: -len(row.token_ids))
    # A batch that fits into one micro-batch is work for all processes too.
    share = -(-sum(len(row.token_ids) for row in rows) // num_parts)
    parts: list[list[MicroBatch]] = [[] for _ in range(num_parts)]
    for chunk in _chunks(rows, min(max_tokens, share) if num_parts > 1 else max_tokens):
        least = min(parts, key=lambda part: sum(micro.num_tokens for micro in part))
        least.append(_padded(chunk))
    return parts


def _rows(batch: Batch, settings: LossSettings) -> list[_Row]:
    trajectories = batch.trajectories
    scores = torch.cat([advantages(settings.advantage, rewards_of(group)) for group in batch.groups])
    fresh = [age == 0 for group, age in zip(batch.groups, batch.staleness, strict=True) for _ in group.trajectories]
    masks = [torch.tensor(trajectory.loss_mask) for trajectory in trajectories]
    for mask in masks:
        # Nothing predicts the first token.
        mask[0] = False
    weights = token_weights(pad_sequence(masks, batch_first=True), settings.mean)
    return [
        _Row(
            token_ids=torch.tensor(trajectory.token_ids),
            mask=mask,
            behaviour=torch.tensor(trajectory.logprobs, dtype=torch.float32),
            advantages=scores[number].expand(len(mask)),
            weights=weights[number, : len(mask)],
            fresh=torch.full_like(mask, fresh[number]),
        )
        for number, (trajectory, mask) in enumerate(zip(trajectories, masks, strict=True))
        if mask.any()
    ]


def _chunks(rows: list[_Row], max_tokens: int) -> list[list[_Row]]:
    """Rows come longest first, so the first of a chunk says how wide it is."""
    chunks: list[list[_Row]] = []
    for row in rows:
        if chunks and (len(chunks[-1]) + 1) * len(chunks[-1][0].token_ids) <= max_tokens:
            chunks[-1].append(row)
        else:
            chunks.append([row])
    return chunks


def _padded(rows: list[_Row]) -> MicroBatch:
    columns = {name: [getattr(row, name) for row in rows] for name in vars(rows[0])}
    return MicroBatch(**{name: pad_sequence(tensors, batch_first=True) for name, tensors in columns.items()})
