"""What a model can do: conversations in, accuracy with its uncertainty out.

prompts -> converse -> Trajectory -> EvaluationReport -> table, JSON, plot (rl.evaluation_plot)
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import NormalDist, fmean
from typing import get_args

from rl.gather import gather
from rl.generate import Generate
from rl.rollout import RolloutSettings, rollout
from rl.tokenizer import Tokenizer
from rl.types import FailureMode, Frozen, Prompt, Trajectory
from rl.zorplex import TASKS

FAILURE_MODES: tuple[FailureMode, ...] = get_args(FailureMode)


class Interval(Frozen):
    """Both ends of a confidence interval of a share."""

    low: float
    high: float


class Tally(Frozen):
    """What became of the conversations of one task, or of all."""

    label: str
    """`compositional/hard`, or `overall`."""
    description: str = ""
    num_samples: int
    num_correct: int
    accuracy: float
    accuracy_interval: Interval
    """Wilson's, at the report's confidence."""
    format_rate: float
    """Share with an answer in the form asked for, right or wrong."""
    mean_turns: float
    mean_tool_calls: float
    mean_sampled_tokens: float
    mean_reward: float
    failure_modes: dict[FailureMode, int]
    """Every mode is here, with 0 where nothing was judged so."""


class EvaluationReport(Frozen):
    """A model's results, task by task and overall."""

    model: str
    version: int | None
    """Version of the weights, None where it is not the same for all conversations."""
    seeds: tuple[int, ...]
    confidence: float
    tasks: tuple[Tally, ...]
    overall: Tally


def wilson(successes: int, count: int, confidence: float = 0.95) -> Interval:
    """The confidence interval of a share, sound for small counts and near 0 and 1 too.

    Wilson 1927. The trials must be independent, so take one sample of a prompt. (0, 1) where there is no trial.
    """
    if not 0 <= successes <= count:
        raise ValueError(f"successes must be 0 to the count, got {successes} of {count}")
    if count == 0:
        return Interval(low=0.0, high=1.0)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = successes / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    reach = z * (share * (1 - share) / count + spread / (4 * count)) ** 0.5 / (1 + spread)
    low = 0.0 if successes == 0 else max(0.0, centre - reach)
    high = 1.0 if successes == count else min(1.0, centre + reach)
    return Interval(low=low, high=high)


def tally(label: str, trajectories: Sequence[Trajectory], confidence: float = 0.95, description: str = "") -> Tally:
    """Count and average conversations; all averages are 0 where there is none."""

    def mean(numbers: Iterable[float]) -> float:
        return fmean(listed) if (listed := list(numbers)) else 0.0

    modes = Counter(trajectory.failure_mode for trajectory in trajectories)
    return Tally(
        label=label,
        description=description,
        num_samples=len(trajectories),
        num_correct=modes["success"],
        accuracy=modes["success"] / max(1, len(trajectories)),
        accuracy_interval=wilson(modes["success"], len(trajectories), confidence),
        format_rate=mean(one.answer is not None for one in trajectories),
        mean_turns=mean(len(one.turns) for one in trajectories),
        mean_tool_calls=mean(one.num_tool_calls for one in trajectories),
        mean_sampled_tokens=mean(one.num_sampled for one in trajectories),
        mean_reward=mean(one.reward for one in trajectories),
        failure_modes={mode: modes[mode] for mode in FAILURE_MODES},
    )


def evaluation_report(
    model: str, trajectories: Sequence[Trajectory], *, seeds: Sequence[int] = (), confidence: float = 0.95
) -> EvaluationReport:
    """The conversations by task and difficulty, in the order in which the tasks first come."""
    by_label: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        by_label.setdefault(trajectory.prompt.task.label, []).append(trajectory)
    versions = {v for one in trajectories for v in (one.oldest_version, one.newest_version) if v is not None}
    return EvaluationReport(
        model=model,
        version=versions.pop() if len(versions) == 1 else None,
        seeds=tuple(seeds),
        confidence=confidence,
        tasks=tuple(
            tally(label, found, confidence, TASKS[found[0].prompt.task.name].description)
            for label, found in by_label.items()
        ),
        overall=tally("overall", trajectories, confidence),
    )


async def converse(
    generate: Generate,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    settings: RolloutSettings,
    *,
    seed: int = 0,
    concurrency: int = 64,
) -> list[Trajectory]:
    """One conversation about each prompt, in the prompts' order, at most `concurrency` at once."""
    places = asyncio.Semaphore(concurrency)

    async def one(prompt: Prompt) -> Trajectory:
        async with places:
            return await rollout(generate, tokenizer, prompt, settings, group_id=prompt.id, seed=seed)

    return await gather(one(prompt) for prompt in prompts)


def table(report: EvaluationReport) -> list[list[str]]:
    """The report as rows of words, the head first and the overall row last."""
    head = ["task", "accuracy", f"{report.confidence:.0%} interval", "correct", "turns", "tools", "format"]
    rows = [head + [mode.replace("_", " ") for mode in FAILURE_MODES[1:]]]
    for found in (*report.tasks, report.overall):
        interval = found.accuracy_interval
        rows.append(
            [
                found.label,
                f"{found.accuracy:.1%}",
                f"{interval.low:.1%} - {interval.high:.1%}",
                f"{found.num_correct}/{found.num_samples}",
                f"{found.mean_turns:.1f}",
                f"{found.mean_tool_calls:.1f}",
                f"{found.format_rate:.1%}",
                *(str(found.failure_modes[mode]) for mode in FAILURE_MODES[1:]),
            ]
        )
    return rows


def transcript(trajectory: Trajectory) -> str:
    """One conversation to be read by people."""
    verdict = f"{trajectory.failure_mode}, reward {trajectory.reward:.2f}"
    lines = [
        f"{trajectory.prompt.question}  ({trajectory.prompt.id})",
        f"wanted {trajectory.prompt.answer}, got {'no answer' if trajectory.answer is None else trajectory.answer}: "
        f"{verdict} ({trajectory.stop_reason})",
    ]
    for number, turn in enumerate(trajectory.turns, 1):
        lines.append(f"  {number}  {turn.text.strip()}")
        lines += [f"     {call.tool}[{call.argument}] -> {call.result}" for call in turn.tool_calls]
    return "\n".join(lines)
