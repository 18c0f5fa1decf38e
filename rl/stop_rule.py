"""Whether a turn that is being sampled is over, token by token."""

import re

from rl.generate import stop_length
from rl.tokenizer import Tokenizer


class StopRule:
    """The text of one turn as it grows, against the request's stop pattern."""

    def __init__(self, tokenizer: Tokenizer, pattern: str) -> None:
        self._tokenizer = tokenizer
        self._pattern = pattern
        self._compiled = re.compile(pattern)
        self._token_ids: list[int] = []
        self._text = ""

    def over(self, token: int) -> bool:
        """Take one more token; True when the turn ends with it."""
        self._token_ids.append(token)
        # Token by token the text may differ a little from the whole, by which a match is confirmed.
        self._text += self._tokenizer.decode([token], skip_special_tokens=True)
        if self._compiled.search(self._text) is None:
            return False
        return stop_length(self._tokenizer, self._token_ids, self._pattern) is not None
