"""The seam between a conversation and an engine: token ids in, one turn's sampled tokens out."""

import re
from collections.abc import Sequence
from typing import Literal, Protocol, Self

from pydantic import Field, model_validator

from rl.tokenizer import Tokenizer
from rl.types import Frozen

Finish = Literal["stop", "length", "abort"]
"""Ended by itself; reached `max_tokens`; or the engine let go of it, e.g. to shut down."""


class GenerateRequest(Frozen):
    """One turn to be sampled."""

    token_ids: tuple[int, ...] = Field(min_length=1)
    """[T] the conversation so far."""
    max_tokens: int = Field(ge=1)
    temperature: float = Field(ge=0)
    """0 takes the likeliest token."""
    seed: int
    """The same request to the same weights samples the same tokens, whatever else the engine does meanwhile."""
    stop_pattern: str
    """A regular expression on the turn's text. Where it first matches, the turn is over. An engine that goes on
    beyond that point wastes time, but does no harm: `cut_at_stop` takes the rest away."""
    to_the_end: bool = False
    """Nothing ends the turn before `max_tokens`, neither the pattern nor the end-of-turn token."""


class Sample(Frozen):
    """What an engine sampled. The three sequences have the shape [N], N being the number of sampled tokens."""

    token_ids: tuple[int, ...]
    """[N] the end-of-turn token included, where one was sampled."""
    logprobs: tuple[float, ...]
    """[N] natural log-probabilities under the distribution that was sampled from (after temperature)."""
    versions: tuple[int, ...]
    """[N] version of the weights that sampled the token; may rise within a turn."""
    finish: Finish

    @model_validator(mode="after")
    def _shapes(self) -> Self:
        lengths = [len(self.token_ids), len(self.logprobs), len(self.versions)]
        if len(set(lengths)) != 1:
            raise ValueError(f"token_ids, logprobs and versions must be equally long, got {lengths}")
        return self

    def first(self, count: int) -> "Sample":
        """The first `count` tokens, as a turn that ended there."""
        return Sample(
            token_ids=self.token_ids[:count],
            logprobs=self.logprobs[:count],
            versions=self.versions[:count],
            finish="stop",
        )


class Generate(Protocol):
    """An engine, or the way to one: in this process, in an actor, behind a port.

    Called for many turns at once, each by a task of its own; batching them is the engine's affair.
    """

    async def __call__(self, request: GenerateRequest) -> Sample:
        """Sample one turn."""
        ...


def stop_length(tokenizer: Tokenizer, token_ids: Sequence[int], pattern: str) -> int | None:
    """The fewest leading tokens whose text has a match, None where even all have none."""
    stop = re.compile(pattern)

    def matches(count: int) -> bool:
        return stop.search(tokenizer.decode(token_ids[:count], skip_special_tokens=True)) is not None

    if not matches(len(token_ids)):
        return None
    low, high = 0, len(token_ids)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if matches(middle) else (middle + 1, high)
    return low


def cut_at_stop(tokenizer: Tokenizer, sample: Sample, pattern: str) -> Sample:
    """The sample without the tokens behind the end of the turn.

    Where a turn ends depends on the tokens before that point alone, so the rest's log-probabilities stay right.
    """
    length = stop_length(tokenizer, sample.token_ids, pattern)
    return sample if length is None else sample.first(length)
