"""A conversation between a model and the tools of a task, token by token.

    prompt -> [ Generate -> cut at the stop rule -> tool calls -> results ]* -> score -> Trajectory

What was sampled goes into the trajectory as the engine gave it, and into the next request as well; text is only looked
at. Tool results are encoded once, when they come in, and carry loss mask False. Nothing here waits but for the engine.
"""

import asyncio
import hashlib
from collections.abc import Sequence

from pydantic import Field

from rl.gather import gather
from rl.generate import Finish, Generate, GenerateRequest, Sample, cut_at_stop
from rl.lengths import LengthTail
from rl.scoring import score
from rl.system_prompts import PromptStyle, messages
from rl.tokenizer import Tokenizer, encode_messages
from rl.types import UNSAMPLED, Frozen, Group, Prompt, StopReason, ToolCall, Trajectory, Turn
from rl.zorplex import Zorplex, open_task
from rl.zorplex_language import STOP_PATTERN, read_answer, read_tool_calls, render_results

_WITHOUT_CALL: dict[Finish, StopReason] = {"stop": "no_tool_call", "length": "max_tokens", "abort": "aborted"}


class RolloutSettings(Frozen):
    """The limits of one conversation."""

    max_turns: int = Field(5, ge=1)
    max_tokens_per_turn: int = Field(150, ge=1)
    max_tokens: int = Field(2048, ge=2)
    """Of the whole conversation, prompt and tool results included: at most what the model can read."""
    temperature: float = Field(1.0, ge=0)
    prompt_style: PromptStyle = "guided"
    lengths: LengthTail | None = None
    """For measurements: every conversation is one turn of a length that is known beforehand, whatever the model writes;
    by default the model ends its turns itself."""
    turn_timeout_s: float = Field(600.0, gt=0)
    """An engine that has not answered by then is given up: TimeoutError."""


class _Tape:
    """The tokens of a conversation, as they come."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids: list[int] = []
        self.loss_mask: list[bool] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.give(token_ids)

    def give(self, token_ids: Sequence[int]) -> None:
        """Tokens that nobody sampled."""
        self._extend(token_ids, False, [0.0] * len(token_ids), [UNSAMPLED] * len(token_ids))

    def take(self, sample: Sample) -> None:
        """Tokens of the model."""
        self._extend(sample.token_ids, True, sample.logprobs, sample.versions)

    def _extend(self, token_ids: Sequence[int], mask: bool, logprobs: Sequence[float], versions: Sequence[int]) -> None:
        self.token_ids += token_ids
        self.loss_mask += [mask] * len(token_ids)
        self.logprobs += logprobs
        self.versions += versions


class _Rollout:
    """One conversation on its way."""

    def __init__(
        self,
        generate: Generate,
        tokenizer: Tokenizer,
        task: Zorplex,
        prompt: Prompt,
        settings: RolloutSettings,
        length: int | None = None,
    ) -> None:
        """`length` is the number of tokens to sample, in one turn, where it is known beforehand."""
        self._generate = generate
        self._tokenizer = tokenizer
        self._task = task
        self._settings = settings
        self._length = length
        self.tape = _Tape(encode_messages(tokenizer, messages(prompt, settings.prompt_style)))
        self.turns: list[Turn] = []
        self.num_discarded = 0

    async def run(self, seed: str) -> StopReason:
        """Turn by turn to the end; says why it ended."""
        if self._room < 1:
            raise ValueError(
                f"the prompt has {len(self.tape.token_ids)} tokens and leaves no room in `max_tokens`, which is "
                f"{self._settings.max_tokens}\n\nhint: raise `max_tokens`, or choose a shorter `prompt_style`"
            )
        while True:
            sample = await self._turn(f"{seed}/{len(self.turns)}")
            self.tape.take(sample)
            ended = self._hear(sample)
            if ended is not None:
                return ended
            if self._length is not None:
                return "max_tokens"
            if len(self.turns) == self._settings.max_turns:
                return "max_turns"
            results = render_results([call.result for call in self.turns[-1].tool_calls])
            token_ids = self._tokenizer.encode(results, add_special_tokens=False)
            if len(token_ids) >= self._room:
                return "max_tokens"
            self.tape.give(token_ids)

    @property
    def _room(self) -> int:
        """Tokens that the conversation may still grow by."""
        return self._settings.max_tokens - len(self.tape.token_ids)

    async def _turn(self, seed: str) -> Sample:
        request = GenerateRequest(
            token_ids=tuple(self.tape.token_ids),
            max_tokens=min(self._room, self._length or self._settings.max_tokens_per_turn),
            temperature=self._settings.temperature,
            seed=int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4]),
            stop_pattern=STOP_PATTERN,
            to_the_end=self._length is not None,
        )
        async with asyncio.timeout(self._settings.turn_timeout_s):
            sample = await self._generate(request)
        if request.to_the_end:
            return sample
        kept = cut_at_stop(self._tokenizer, sample, STOP_PATTERN)
        self.num_discarded += len(sample.token_ids) - len(kept.token_ids)
        return kept

    def _hear(self, sample: Sample) -> StopReason | None:
        """Note the turn, execute its tool calls; why the conversation ends with it, None if it goes on."""
        text = self._tokenizer.decode(sample.token_ids, skip_special_tokens=True)
        answered = read_answer(text, cut=sample.finish != "stop") is not None
        called = [] if answered else read_tool_calls(text)
        calls = [ToolCall(tool=tool, argument=of, result=self._task.call(tool, of)) for tool, of in called]
        self.turns.append(Turn(text=text, num_tokens=len(sample.token_ids), tool_calls=tuple(calls)))
        if answered:
            return "answer"
        if calls:
            return None
        return _WITHOUT_CALL[sample.finish]


async def rollout(
    generate: Generate,
    tokenizer: Tokenizer,
    prompt: Prompt,
    settings: RolloutSettings,
    *,
    group_id: str,
    sample: int = 0,
    seed: int = 0,
) -> Trajectory:
    """One conversation about `prompt`. Its randomness depends on the seed, the group and the sample's number alone.

    Raises ValueError for a prompt that leaves no room to answer, TimeoutError for an engine that does not answer.
    """
    task = open_task(prompt.task, prompt.table_seed)
    length = None if settings.lengths is None else settings.lengths.length(seed, group_id, sample)
    conversation = _Rollout(generate, tokenizer, task, prompt, settings, length)
    stop_reason = await conversation.run(f"{seed}/{group_id}/{sample}")
    judged = score(task, prompt, conversation.turns, stop_reason)
    tape = conversation.tape
    return Trajectory(
        prompt=prompt,
        group_id=group_id,
        sample=sample,
        token_ids=tuple(tape.token_ids),
        loss_mask=tuple(tape.loss_mask),
        logprobs=tuple(tape.logprobs),
        versions=tuple(tape.versions),
        turns=tuple(conversation.turns),
        stop_reason=stop_reason,
        answer=judged.answer,
        failure_mode=judged.failure_mode,
        reward=judged.reward,
        num_discarded=conversation.num_discarded,
    )


async def rollout_group(
    generate: Generate,
    tokenizer: Tokenizer,
    prompt: Prompt,
    settings: RolloutSettings,
    *,
    group_id: str,
    group_size: int,
    seed: int = 0,
) -> Group:
    """All samples of a prompt at once. The first one to fail ends the others, and its error is raised."""
    trajectories = await gather(
        rollout(generate, tokenizer, prompt, settings, group_id=group_id, sample=sample, seed=seed)
        for sample in range(group_size)
    )
    return Group(id=group_id, prompt=prompt, trajectories=tuple(trajectories))
