"""Engines without a model: the oracle, which knows how to use the tools, and a policy that knows nothing.

They show that a task can be solved, make the traces that a model is warm-started on, and stand in for an engine.
"""

import asyncio
import math
import random
import re
from collections.abc import Callable

from rl.generate import GenerateRequest, Sample, cut_at_stop
from rl.tokenizer import Tokenizer
from rl.types import Operator
from rl.zorplex import OPERATORS
from rl.zorplex_table import SEE

_QUESTION = re.compile(r"What is (?:the zorplex value of '(\w+)'|(zorplex\('\w+'\)(?: [-+*] zorplex\('\w+'\))+))\?")
_HEARD = re.compile(r"(?:LOOKUP|GETKEY|FETCH)\[([^\]]+)\]\s*\[Result: (?!UNKNOWN|INVALID)([^\]]*)\]")


def oracle(conversation: str) -> str:
    """What a perfect model says next, from the text alone: it knows no table, and asks the tools what it has not heard.

    Raises ValueError where the text has no question.
    """
    questions = list(_QUESTION.finditer(conversation))
    if not questions:
        raise ValueError(f"a Zorplex question was wanted, got {conversation[-200:]!r}")
    asked = questions[-1]
    heard: dict[str, str] = dict(_HEARD.findall(conversation, asked.end()))
    if asked[2]:
        return _calculate(asked[2], heard)
    tool, of = ("GETKEY" if "GETKEY" in conversation[: asked.start()] else "LOOKUP"), asked[1]
    while of in heard:
        said = heard.pop(of)
        if said.isdigit():
            return f"[ANSWER] {said}"
        tool, of = ("FETCH", said) if said.startswith("ZK_") else ("LOOKUP", said.removeprefix(SEE))
    return f"{tool}[{of}]"


def _calculate(terms: str, heard: dict[str, str]) -> str:
    words = re.findall(r"'(\w+)'", terms)
    for word in words:
        if word not in heard:
            return f"LOOKUP[{word}]"
    symbols: list[Operator] = re.findall(r"\) ([-+*]) ", terms)
    values = [heard[word] for word in words]
    total = int(values[0])
    for symbol, value in zip(symbols, values[1:], strict=True):
        total = OPERATORS[symbol](total, int(value))
    return f"{f' {symbols[0]} '.join(values)} = {total}. [ANSWER] {total}"


class ScriptedEngine:
    """A `Generate` whose every turn is written by a function of the conversation's text, with probability 1."""

    def __init__(self, tokenizer: Tokenizer, script: Callable[[str], str] = oracle, version: int = 0) -> None:
        self._tokenizer = tokenizer
        self._script = script
        self.version = version
        """The weight version that the tokens carry."""

    async def __call__(self, request: GenerateRequest) -> Sample:
        await asyncio.sleep(0)
        text = self._script(self._tokenizer.decode(request.token_ids, skip_special_tokens=True))
        ids = [*self._tokenizer.encode(text, add_special_tokens=False), self._tokenizer.eos_token_id]
        kept = tuple(ids[: request.max_tokens])
        sample = Sample(
            token_ids=kept,
            logprobs=(0.0,) * len(kept),
            versions=(self.version,) * len(kept),
            finish="stop" if len(kept) == len(ids) else "length",
        )
        return cut_at_stop(self._tokenizer, sample, request.stop_pattern)


class RandomEngine:
    """A `Generate` to which all tokens are equally likely."""

    def __init__(self, tokenizer: Tokenizer, version: int = 0) -> None:
        self._tokenizer = tokenizer
        self.version = version

    async def __call__(self, request: GenerateRequest) -> Sample:
        await asyncio.sleep(0)
        rng = random.Random(request.seed)
        ids: list[int] = []
        while len(ids) < request.max_tokens and self._tokenizer.eos_token_id not in ids[-1:]:
            ids.append(rng.randrange(len(self._tokenizer)))
        sample = Sample(
            token_ids=tuple(ids),
            logprobs=(-math.log(len(self._tokenizer)),) * len(ids),
            versions=(self.version,) * len(ids),
            finish="stop" if ids[-1] == self._tokenizer.eos_token_id else "length",
        )
        return cut_at_stop(self._tokenizer, sample, request.stop_pattern)
