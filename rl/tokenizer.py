"""Text to tokens and back: what rl needs of a tokenizer, and the small one of the model `tiny`.

A Hugging Face tokenizer satisfies `Tokenizer` as it is.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

from rl.zorplex_table import WORDS


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that rl uses."""

    @property
    def eos_token_id(self) -> int:
        """The token that ends a turn."""
        ...

    @property
    def chat_template(self) -> object:
        """None where the model was never taught a conversation's form."""
        ...

    def __len__(self) -> int:
        """Number of token ids: all are smaller."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The token ids of a text."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids."""
        ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: Literal[False], add_generation_prompt: bool
    ) -> str:
        """The messages as one text, up to where the assistant's begins."""
        ...


def encode_messages(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """The token ids that a model continues with its first turn; plain lines of text where it knows no chat form."""
    if tokenizer.chat_template is None:
        lines = [f"{message['role'].capitalize()}: {message['content']}\n" for message in messages]
        return tokenizer.encode("".join(lines) + "Assistant:", add_special_tokens=True)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


_SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
_PHRASES = (
    *("LOOKUP", "GETKEY", "FETCH", "ZK_", "UNKNOWN", "INVALID", "[ANSWER] ", "\n[Result: ", "]\n", "SEE: ", "Tools: "),
    *("What is ", "the zorplex value of ", "zorplex(", " + ", " - ", " * ", " = "),
)


class TinyTokenizer:
    """Words and phrases of the task language are one token each, everything else is its UTF-8 bytes.

    So numbers are digits, and any text comes back as it was: `decode(encode(text)) == text` (but for text that spells a
    special token, e.g. `<|end|>`, which is one).
    """

    pad_token_id = 0
    eos_token_id = 1
    chat_template = "<|role|>content"

    def __init__(self, pieces: Sequence[str] = (*_PHRASES, *WORDS)) -> None:
        self.pieces = tuple(pieces)
        tokens = (*_SPECIAL, *self.pieces)
        self._id_of = {token: number for number, token in enumerate(tokens)}
        self._first_byte = len(tokens)
        self._text_of = [*(token.encode() for token in tokens), *(bytes([byte]) for byte in range(256))]
        longest_first = sorted(tokens, key=len, reverse=True)
        self._piece = re.compile("|".join(map(re.escape, longest_first)))

    def __len__(self) -> int:
        return len(self._text_of)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids from left to right, each the longest that fits. There are no tokens to add."""
        found: list[int] = []
        end = 0
        for piece in self._piece.finditer(text):
            found += self._bytes(text[end : piece.start()])
            found.append(self._id_of[piece[0]])
            end = piece.end()
        return found + self._bytes(text[end:])

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text; bytes that are no UTF-8 become the replacement character."""
        first = len(_SPECIAL) if skip_special_tokens else 0
        return b"".join(self._text_of[token] for token in token_ids if token >= first).decode(errors="replace")

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: Literal[False] = False, add_generation_prompt: bool
    ) -> str:
        """`<|system|>Tools: LOOKUP.<|user|>What is ...?<|assistant|>`."""
        text = "".join(f"<|{message['role']}|>{message['content']}" for message in conversation)
        return text + "<|assistant|>" * add_generation_prompt

    def save(self, path: Path) -> None:
        """Write what `load` needs, as JSON."""
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_text(json.dumps({"format": "tiny-tokenizer-1", "pieces": self.pieces}, indent=1) + "\n")
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> "TinyTokenizer":
        """The tokenizer that was saved; ValueError for another format."""
        saved = json.loads(path.read_text())
        if saved.get("format") != "tiny-tokenizer-1":
            raise ValueError(f"`{path}` is no tokenizer of `tiny`: format is `{saved.get('format')}`")
        return cls(saved["pieces"])

    def _bytes(self, text: str) -> list[int]:
        return [self._first_byte + byte for byte in text.encode()]
