"""The tokenizer of `tiny` as transformers has tokenizers. Imported where transformers is, be it ours or a peer's."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizer

from rl.tokenizer import TinyTokenizer


class HuggingFaceTiny(PreTrainedTokenizer):  # type: ignore[misc]  # transformers is not followed
    """A `TinyTokenizer`: same text, same ids."""

    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, tiny: TinyTokenizer) -> None:
        self._tiny = tiny
        names = {tiny.pad_token_id: "<|pad|>", tiny.eos_token_id: "<|end|>"}
        self._name_of = [names.get(number, f"<{number}>") for number in range(len(tiny))]
        self._id_of = {name: number for number, name in enumerate(self._name_of)}
        super().__init__(pad_token="<|pad|>", eos_token="<|end|>", padding_side="left")

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self._tiny)

    def get_vocab(self) -> dict[str, int]:
        """Names of the tokens; they are no text."""
        return dict(self._id_of)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [self._name_of[number] for number in self._tiny.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self._id_of[token]

    def _convert_id_to_token(self, index: int) -> str:
        return self._name_of[index]

    def _decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False, **_: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        return self._tiny.decode(ids, skip_special_tokens=skip_special_tokens)
