"""A causal language model seen from its tokens: the logits that predict the tokens that are asked for, no others.

The head is most of a small model's work and of its memory, and prompts and tool results need none of it.
"""

from typing import Any

import torch
from torch import Tensor


class TokenModel:
    """Wraps a model of transformers, in evaluation mode: no dropout, as the engine samples."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self._predicting: Tensor | None = None
        self.model.get_output_embeddings().register_forward_pre_hook(self._select)

    def logits(self, token_ids: Tensor, wanted: Tensor) -> Tensor:
        """[number of True in `wanted`, V] what predicts these tokens of `token_ids`; both [rows, T].

        Rows are padded on the right, where a causal model does not look. `wanted[:, 0]` must be False.
        """
        self._predicting = wanted.roll(-1, dims=1)
        try:
            found: Tensor = self.model(input_ids=token_ids, use_cache=False).logits
        finally:
            self._predicting = None
        return found

    def logprobs(self, token_ids: Tensor) -> Tensor:
        """[T - 1] natural log-probabilities of a sequence [T], but for its first token."""
        wanted = torch.ones_like(token_ids, dtype=torch.bool)
        wanted[0] = False
        with torch.no_grad():
            scores = self.logits(token_ids[None], wanted[None]).float().log_softmax(-1)
            return scores.gather(-1, token_ids[1:, None])[:, 0]

    def _select(self, _: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return None if self._predicting is None else (inputs[0][self._predicting], *inputs[1:])
