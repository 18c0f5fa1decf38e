"""Conversations with tools: tokens stay as the engine gave them, and only the model's own are trained on."""

import asyncio
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rl.generate import Finish, GenerateRequest, Sample, cut_at_stop, stop_length
from rl.rollout import RolloutSettings, rollout, rollout_group
from rl.scripted import RandomEngine, ScriptedEngine
from rl.tokenizer import TinyTokenizer
from rl.types import UNSAMPLED, Prompt, Task, Trajectory
from rl.zorplex import open_task
from rl.zorplex_language import STOP_PATTERN

TOKENIZER = TinyTokenizer()
BRIEF = RolloutSettings(prompt_style="brief")
UMBRELLA = next(open_task(Task(name="simple"), 42).prompts())
"""What is the zorplex value of 'umbrella'? It is 30."""
TWO_WORDS = next(open_task(Task(name="compositional"), 42).prompts())
"""What is zorplex('umbrella') + zorplex('dog')? It is 30 + 95 = 125."""


def byte_by_byte(text: str) -> list[int]:
    """The text in tokens that the tokenizer itself would not choose."""
    return [token for character in text for token in TOKENIZER.encode(character)]


class Engine:
    """Says one thing after the other, and keeps what it was asked."""

    def __init__(
        self,
        *turns: str,
        finish: Finish = "stop",
        end: Sequence[int] = (TOKENIZER.eos_token_id,),
        encode: Callable[[str], list[int]] = TOKENIZER.encode,
    ) -> None:
        self._turns = list(turns)
        self._finish = finish
        self._end = end
        self._encode = encode
        self.requests: list[GenerateRequest] = []
        self.samples: list[Sample] = []

    async def __call__(self, request: GenerateRequest) -> Sample:
        ids = [*self._encode(self._turns[len(self.requests)]), *self._end]
        self.requests.append(request)
        start = 10 * len(self.requests)
        sample = Sample(
            token_ids=tuple(ids),
            logprobs=tuple(-(start + place) / 100 for place in range(len(ids))),
            versions=tuple(len(self.requests) + (place > 2) for place in range(len(ids))),
            finish=self._finish,
        )
        self.samples.append(sample)
        return sample


async def run(engine: Engine, prompt: Prompt = UMBRELLA, **limits: object) -> Trajectory:
    settings = RolloutSettings.model_validate({"prompt_style": "brief", **limits})
    return await rollout(engine, TOKENIZER, prompt, settings, group_id="g")


async def test_what_was_sampled_is_kept_and_what_tools_say_is_not_trained_on() -> None:
    engine = Engine("LOOKUP[umbrella]", "LOOKUP[dog]", "30 + 95 = 125. [ANSWER] 125", end=(), encode=byte_by_byte)
    done = await run(engine, TWO_WORDS)
    assert (done.failure_mode, done.answer, done.reward) == ("success", 125, pytest.approx(1.2))

    prompt = list(engine.requests[0].token_ids)
    assert TOKENIZER.decode(prompt) == f"<|system|>Tools: LOOKUP.<|user|>{TWO_WORDS.question}<|assistant|>"
    one, two, three = engine.samples
    results = [TOKENIZER.encode(f"\n[Result: {value}]\n") for value in (30, 95)]
    assert list(done.token_ids) == [*prompt, *one.token_ids, *results[0], *two.token_ids, *results[1], *three.token_ids]
    assert [request.token_ids for request in engine.requests[1:]] == [
        done.token_ids[: len(prompt) + len(one.token_ids) + len(results[0])],
        done.token_ids[: -len(three.token_ids)],
    ]
    parts = [(prompt, None), (one.token_ids, one), (results[0], None), (two.token_ids, two), (results[1], None)]
    parts.append((three.token_ids, three))
    wanted = [
        (sample is not None, sample.logprobs[place] if sample else 0.0, sample.versions[place] if sample else UNSAMPLED)
        for ids, sample in parts
        for place in range(len(ids))
    ]
    assert list(zip(done.loss_mask, done.logprobs, done.versions, strict=True)) == wanted
    assert (done.oldest_version, done.newest_version) == (1, 4)
    assert done.num_sampled == sum(turn.num_tokens for turn in done.turns) == sum(done.loss_mask)


async def test_an_engine_that_goes_on_does_no_harm() -> None:
    beyond = " and [Result: 30]\n[ANSWER] 30\n"
    done = await run(Engine("LOOKUP[umbrella]" + beyond, "so [ANSWER] 30\nLOOKUP[cat]"))
    assert [turn.text for turn in done.turns] == ["LOOKUP[umbrella]", "so [ANSWER] 30\n"]
    assert (done.failure_mode, done.num_tool_calls) == ("success", 1)
    assert done.num_discarded == len(TOKENIZER.encode(beyond)) + 1 + len(TOKENIZER.encode("LOOKUP[cat]")) + 1
    assert len(done.token_ids) == len(done.versions)


async def test_the_token_that_ends_a_turn_is_trained_on() -> None:
    done = await run(Engine("[ANSWER] 30"))
    assert done.token_ids[-1] == TOKENIZER.eos_token_id and done.loss_mask[-1]
    assert done.turns[0].text == "[ANSWER] 30"


async def test_a_number_that_was_cut_off_is_no_answer() -> None:
    done = await run(Engine("[ANSWER] 30", finish="length", end=()))
    assert (done.answer, done.stop_reason, done.failure_mode, done.reward) == (None, "max_tokens", "truncated", 0.0)
    done = await run(Engine("[ANSWER] 30\n", finish="length", end=()))
    assert (done.answer, done.stop_reason, done.failure_mode) == (30, "answer", "success")


async def test_a_turn_without_answer_or_tool_call_is_the_last() -> None:
    done = await run(Engine("It is 30."))
    assert (done.stop_reason, done.failure_mode) == ("no_tool_call", "wrong_format")
    done = await run(Engine("It is", finish="abort", end=()))
    assert (done.stop_reason, done.failure_mode) == ("aborted", "truncated")


async def test_turns_are_limited() -> None:
    done = await run(Engine(*["LOOKUP[dog]"] * 3), max_turns=3)
    assert (done.stop_reason, done.failure_mode, len(done.turns)) == ("max_turns", "truncated", 3)
    assert done.loss_mask[-1]
    done = await run(Engine(*["LOOKUP[dog]"] * 5))
    assert (done.stop_reason, done.failure_mode) == ("max_turns", "tool_spam")


async def test_tokens_are_limited() -> None:
    engine = Engine("LOOKUP[dog]", "It may be", finish="length", end=())
    prompt = len((await run(Engine("no"))).token_ids) - 3
    done = await run(engine, max_tokens=prompt + 16, max_tokens_per_turn=12)
    assert [request.max_tokens for request in engine.requests] == [12, 16 - 4 - 4]
    assert done.stop_reason == "max_tokens"
    done = await run(Engine("LOOKUP[dog]"), max_tokens=prompt + 8)
    assert (done.stop_reason, len(done.token_ids)) == ("max_tokens", prompt + 4)
    with pytest.raises(ValueError, match=f"the prompt has {prompt} tokens and leaves no room in `max_tokens`"):
        await run(Engine("no"), max_tokens=prompt)


async def test_an_engine_that_does_not_answer_is_given_up() -> None:
    async def silent(request: GenerateRequest) -> Sample:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(TimeoutError):
        await rollout(silent, TOKENIZER, UMBRELLA, RolloutSettings(turn_timeout_s=0.01), group_id="g")


async def test_a_group_is_sampled_at_once_and_in_order() -> None:
    everyone, oracle = asyncio.Barrier(8), ScriptedEngine(TOKENIZER, version=3)

    async def meet(request: GenerateRequest) -> Sample:
        async with asyncio.timeout(60):
            await everyone.wait()
        return await oracle(request)

    group = await rollout_group(meet, TOKENIZER, UMBRELLA, BRIEF, group_id="7", group_size=8)
    assert [one.sample for one in group.trajectories] == list(range(8))
    assert group.rewards == (1.2,) * 8 and not group.informative
    assert group.oldest_version == 3 and group.num_sampled == sum(one.num_sampled for one in group.trajectories)


async def test_the_first_failure_ends_the_group() -> None:
    left: list[int] = []

    async def fail(request: GenerateRequest) -> Sample:
        if not left:
            left.append(0)
            raise ConnectionError("the engine is gone")
        try:
            await asyncio.Event().wait()
        finally:
            left.append(request.seed)
        raise AssertionError

    with pytest.raises(ConnectionError, match="the engine is gone"):
        await rollout_group(fail, TOKENIZER, UMBRELLA, BRIEF, group_id="7", group_size=3)
    assert len(left) == 3


async def test_samples_differ_and_repeat() -> None:
    engine = RandomEngine(TOKENIZER)
    groups = [
        await rollout_group(engine, TOKENIZER, UMBRELLA, BRIEF, group_id=name, group_size=4, seed=seed)
        for name, seed in (("1", 0), ("1", 0), ("2", 0), ("1", 1))
    ]
    assert groups[0] == groups[1]
    assert len({one.token_ids for group in groups for one in group.trajectories}) == 12


def test_a_sample_has_one_shape() -> None:
    with pytest.raises(ValidationError, match=r"must be equally long, got \[2, 1, 2\]"):
        Sample(token_ids=(1, 2), logprobs=(0.0,), versions=(0, 0), finish="stop")


@given(st.text(alphabet="LOKUP[]catANSWER 0123456789-,.\n", max_size=40), st.integers(-(10**4), 10**4))
def test_a_turn_is_cut_at_the_first_token_that_ends_it(before: str, number: int) -> None:
    ids = TOKENIZER.encode(f"{before}LOOKUP[cat] [ANSWER] {number}\nmore")
    length = stop_length(TOKENIZER, ids, STOP_PATTERN)
    assert length is not None
    ends = [count for count in range(len(ids)) if stop_length(TOKENIZER, ids[:count], STOP_PATTERN) is not None]
    assert ends[0] == length
    sample = Sample(token_ids=tuple(ids), logprobs=(0.0,) * len(ids), versions=(0,) * len(ids), finish="length")
    cut = cut_at_stop(TOKENIZER, sample, STOP_PATTERN)
    assert (cut.token_ids, cut.finish) == (tuple(ids[:length]), "stop")
    assert cut_at_stop(TOKENIZER, cut, STOP_PATTERN) == cut
