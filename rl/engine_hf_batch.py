"""The rows of the control engine: turns, batches of them, and what the model has computed of a batch that ended.

RowTurn, RowTurn, ... -> Rows -> choose, token by token          Rows, cache -> KeysAndValues -> cache of the next Rows
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rl.engine_turn import Turn
from rl.generate import GenerateRequest
from rl.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch


class RowTurn(Turn):
    """A turn that is a row of one batch after the other."""

    def __init__(self, request: GenerateRequest, tokenizer: Tokenizer, max_model_tokens: int) -> None:
        import torch

        super().__init__(request, tokenizer)
        self.request = request
        self.most = min(request.max_tokens, max_model_tokens - len(request.token_ids))
        generator = torch.Generator().manual_seed(request.seed)
        self.uniforms = torch.rand(self.most, dtype=torch.float64, generator=generator)
        """[most] the number that each token is drawn by: of the seed alone, whatever the batch."""

    @property
    def whole(self) -> list[int]:
        """The conversation up to here."""
        return [*self.request.token_ids, *self.token_ids]


class Rows:
    """The turns of one call of `generate`, a row each."""

    def __init__(self, turns: Mapping[int, RowTurn], device: "torch.device") -> None:
        import torch

        self.turns = list(turns.values())
        self.running = [(row, key, turn) for row, (key, turn) in enumerate(turns.items())]
        """Row, key and turn of those that have not ended."""
        self.token_ids, self.mask = padded([turn.whole for turn in self.turns], device)
        self.length = self.token_ids.shape[1]
        """Of the longest row, grows with each token."""
        left = [turn.uniforms[len(turn.token_ids) :] for turn in self.turns]
        self.most = max(map(len, left))
        """Tokens until the last row is full."""
        uniforms = torch.nn.utils.rnn.pad_sequence(left)
        self._uniforms = iter(uniforms.to(device)[:, :, None])
        temperatures = torch.tensor([turn.request.temperature for turn in self.turns])
        greedy = temperatures == 0
        self._greedy = greedy.to(device) if greedy.any() else None
        self._temperatures = temperatures.where(~greedy, 1.0).to(device)[:, None]

    def choose(self, scores: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
        """[batch, 1] the next token of each row, and its log-probability; `scores` [batch, vocabulary] are overwritten.

        By inverse transform sampling: the token in whose share of [0, 1) the row's uniform number lies.
        """
        import torch

        logprobs = scores.div_(self._temperatures).log_softmax(-1)
        shares = logprobs.exp().cumsum(-1, dtype=torch.float64)
        drawn = torch.searchsorted(shares, next(self._uniforms) * shares[:, -1:], right=True)
        chosen = drawn.clamp_(max=scores.shape[1] - 1)
        if self._greedy is not None:
            chosen[self._greedy] = scores[self._greedy].argmax(-1, keepdim=True)
        self.length += 1
        return chosen, logprobs.gather(1, chosen)


class KeysAndValues:
    """What the model has computed of the rows of a batch that was ended, all but the last token of each."""

    def __init__(self, batch: Rows, cache: Any) -> None:
        self._rows = {turn: row for row, turn in enumerate(batch.turns)}
        self._cache = cache
        self.can_be_rearranged = _is_plain(cache) and cache.get_seq_length() == batch.length - 1
        """Whether they can be taken apart by rows and columns: windows and states cannot."""

    def holds(self, turn: RowTurn) -> bool:
        """Whether it ran in that batch."""
        return turn in self._rows

    def rearranged(self, batch: Rows, added: Any) -> Any:
        """As a cache for `batch`: the rows that are here, above those of the cache `added`, if any."""
        import torch

        # Turns are in the order in which they came, so what was kept comes first.
        rows = [self._rows[turn] for turn in batch.turns if turn in self._rows]
        length = batch.length - 1
        for number, layer in enumerate(self._cache.layers):
            for name in ("keys", "values"):
                joined = _fitted(getattr(layer, name)[:, :, -length:][rows], length)
                if added is not None:
                    joined = torch.cat([joined, _fitted(getattr(added.layers[number], name), length)])
                setattr(layer, name, joined)
        return self._cache


def padded(rows: Sequence[Sequence[int]], device: "torch.device") -> tuple["torch.Tensor", "torch.Tensor"]:
    """[rows, longest] token ids with padding on the left, and 1 where there is a token; one column at least."""
    import torch

    width = max(1, *map(len, rows))
    token_ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return token_ids.to(device), mask.to(device)


def _fitted(tensor: "torch.Tensor", length: int) -> "torch.Tensor":
    """[batch, heads, length, head dimension] with zeros on the left, where padding is."""
    import torch

    missing = length - tensor.shape[2]
    return torch.nn.functional.pad(tensor, (0, 0, missing, 0)) if missing else tensor


def _is_plain(cache: Any) -> bool:
    """Whether each layer has keys and values of all tokens."""
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in getattr(cache, "layers", [None]))
