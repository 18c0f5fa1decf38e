"""What a conversation is worth: answer -> failure mode -> reward.

A right answer is worth 1. Of the right form alone nothing is to be had: the bonus for it is paid only when the tools
have shown everything that the answer needs. Tool calls beyond those needed cost.
"""

from collections.abc import Sequence

from rl.types import FailureMode, Frozen, Prompt, StopReason, ToolCall, Turn
from rl.zorplex import Zorplex
from rl.zorplex_language import read_answer, writes_results

CORRECT, FORMAT_BONUS, EXTRA_CALL = 1.0, 0.2, -0.1
_FREE_CALLS, _SPAM_CALLS = 2, 3
"""Tool calls that cost nothing, and that are not yet spam, whatever the question needs."""


class Score(Frozen):
    """The judgement of one conversation."""

    answer: int | None
    failure_mode: FailureMode
    reward: float


def score(task: Zorplex, prompt: Prompt, turns: Sequence[Turn], stop_reason: StopReason) -> Score:
    """Judge a finished conversation by what the model wrote and the tool calls it made."""
    answer = read_answer(turns[-1].text) if stop_reason == "answer" else None
    if any(writes_results(turn.text) for turn in turns):
        answer = None
    needed = task.solution(prompt)
    made = [call for turn in turns for call in turn.tool_calls]
    mode = judge(answer, prompt.answer, stop_reason, len(made), max(_SPAM_CALLS, len(needed)))
    reward = CORRECT * (mode == "success") + EXTRA_CALL * max(0, len(made) - max(_FREE_CALLS, len(needed)))
    if answer is not None and _shown(needed, made):
        reward += FORMAT_BONUS
    return Score(answer=answer, failure_mode=mode, reward=reward)


def judge(
    answer: int | None, wanted: int, stop_reason: StopReason, num_tool_calls: int, max_tool_calls: int
) -> FailureMode:
    """Why a conversation failed, or that it did not.

    `success`: the right number behind the tag, in the model's own text. Else `tool_spam`: more than `max_tool_calls`,
    with or without an answer. Else `truncated`: cut by a limit before an answer. Else `wrong_format`: no answer in the
    form asked for, or results that the model made up. Else `wrong_answer`.
    """
    if answer == wanted:
        return "success"
    if num_tool_calls > max_tool_calls:
        return "tool_spam"
    if answer is None:
        return "truncated" if stop_reason in ("max_turns", "max_tokens", "aborted") else "wrong_format"
    return "wrong_answer"


def _shown(needed: Sequence[ToolCall], made: Sequence[ToolCall]) -> bool:
    """Whether the results that carry a value have all been seen, by whichever calls."""
    values = {(call.tool, call.argument) for call in needed if call.result.lstrip("-").isdigit()}
    return values <= {(call.tool, _normal(call)) for call in made}


def _normal(call: ToolCall) -> str:
    return call.argument.upper() if call.tool == "FETCH" else call.argument.lower()
