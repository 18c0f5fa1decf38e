"""From what was written down of a run to the numbers of its cell.

    Trace (the meter's) + UpdateRecords (the loop's) + RunResult (the ledger's) -> CellRun

The times of updates, idle shares, tokens and samples come from the trace alone, so they do not depend on what a stack
or the loop says of itself; the ledger is what they are held against.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import fmean, median, quantiles

from rl.bench.intervals import Interval, length_s
from rl.bench.meter import Call, Trace
from rl.bench.results import Accounting, CellRun, ControlPlane, RewardPoint, RoleUsage, Span, StartUp, WeightSync
from rl.ledger import Tokens
from rl.metrics import UpdateRecord
from rl.types import Group, Mismatch

_TIMELINE_UPDATES = 4


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run that is over."""

    trace: Trace
    records: Sequence[UpdateRecord]
    tokens: Tokens
    began_at: float
    """When its process began, in seconds since 1970."""
    usage: tuple[RoleUsage, ...]
    warmup_updates: int
    num_updates: int
    num_cores: int


def measured(run: CellRun, facts: RunFacts) -> CellRun:
    """The run with its numbers. Raises ValueError for one that ended before its last update."""
    trace, first, last = facts.trace, facts.warmup_updates, facts.warmup_updates + facts.num_updates
    updates = trace.of("update")
    if len(updates) < last:
        raise ValueError(f"the run ended after {len(updates)} of {last} updates")
    ends = [call.end_s for call in updates]
    window = (ends[first - 1], ends[last - 1])
    of_window = updates[first:last]
    records = [record for record in facts.records if first <= record.train.update < last]
    batches = [call.request for call in of_window]
    accounting = _accounting(trace, facts.tokens)
    return run.model_copy(
        update={
            "num_updates": facts.num_updates,
            "update_s": tuple(later - sooner for sooner, later in pairwise(ends[first - 1 : last])),
            "duration_s": window[1] - window[0],
            "trajectories": sum(len(batch.trajectories) for batch in batches),
            "trained_tokens": sum(group.num_sampled for batch in batches for group in batch.groups),
            "generated_tokens": sum(_num_tokens(call.reply) for call in trace.of("generate") if _ends_in(call, window)),
            "num_cores": facts.num_cores,
            **_shares(trace, window),
            "staleness": tuple(age for batch in batches for age in batch.staleness),
            "versions_per_trajectory": fmean(record.versions_per_trajectory for record in records),
            "wasted_share": accounting.wasted / accounting.generated if accounting.generated else 0.0,
            "accounting": accounting,
            "weights": _weight_sync(records, synchronous=run.key.max_staleness == 0),
            "fresh": together(record.train.fresh for record in records),
            "stale": together(record.train.stale for record in records),
            "control": _control(trace, of_window, window),
            "start_up": _start_up(trace, facts.began_at),
            "usage": facts.usage,
            "rewards": _rewards(updates),
            "timeline": _timeline(trace, (window[0], ends[min(last, first + _TIMELINE_UPDATES) - 1])),
        }
    )


def together(of_updates: Iterable[Mismatch | None]) -> Mismatch | None:
    """Of several updates; means weighted by their tokens."""
    found = [one for one in of_updates if one is not None]
    count = sum(one.num_tokens for one in found)
    if not count:
        return None

    def mean(of: Callable[[Mismatch], float]) -> float:
        return sum(of(one) * one.num_tokens for one in found) / count

    return Mismatch(
        num_tokens=count,
        k3_kl=mean(lambda one: one.k3_kl),
        effective_sample_size=mean(lambda one: one.effective_sample_size),
        max_difference=max(one.max_difference for one in found),
    )


def _num_tokens(group: Group) -> int:
    return group.num_sampled + sum(one.num_discarded for one in group.trajectories)


def _ends_in(call: Call, window: Interval) -> bool:
    return window[0] < call.end_s <= window[1]


def _shares(trace: Trace, window: Interval) -> dict[str, float]:
    """Of time at work: the trainer in `update`, a generator while it is asked for a group."""
    duration_s = window[1] - window[0]
    of_parts: dict[str, list[Interval]] = {}
    for call in trace.calls:
        if call.method in ("update", "generate"):
            of_parts.setdefault(call.part, []).append((call.begin_s, call.end_s))
    trainer = of_parts.pop("trainer")
    generators = [one for of_one in of_parts.values() for one in of_one]
    trainer_s, generator_s = length_s(trainer, window), length_s(generators, window)
    both_s = trainer_s + generator_s - length_s([*trainer, *generators], window)
    rarer_s = min(trainer_s, generator_s)
    return {
        "trainer_idle": 1 - trainer_s / duration_s,
        "generator_idle": 1 - fmean(length_s(of_one, window) for of_one in of_parts.values()) / duration_s,
        "overlap": both_s / rarer_s if rarer_s else 0.0,
    }


def _accounting(trace: Trace, tokens: Tokens) -> Accounting:
    """Generated and trained as they crossed the seam, the rest by the loop's ledger of its last moment.

    Groups that came in after that moment, while the trainer wrote its checkpoint, were in flight then. The ledger must
    agree with all that came before them to the token, or nothing is made up for them.
    """
    consumed = [one for call in trace.of("update") for one in call.request.trajectories]
    sizes = [_num_tokens(call.reply) for call in trace.of("generate")]
    sums = [0, *accumulate(sizes)]
    late = sums[-1] - tokens.generated if tokens.generated in sums else 0
    return Accounting(
        generated=sums[-1],
        trained=sum(one.num_sampled for one in consumed),
        wasted=tokens.wasted,
        in_flight=tokens.buffered + late,
        consumed_trajectories=len(consumed),
        distinct_trajectories=len({(one.group_id, one.sample) for one in consumed}),
    )


def _weight_sync(records: Sequence[UpdateRecord], *, synchronous: bool) -> WeightSync:
    phases = [record.phases for record in records]
    return WeightSync(
        num_bytes=records[-1].weights_bytes,
        snapshot_s=median(one.snapshot_s for one in phases),
        push_s=median(one.push_s for one in phases),
        pull_s=median(one.pull_s for one in phases),
        reload_s=median(one.reload_s for one in phases),
        pause_s=median(one.pause_s for one in phases),
        exposed_s=median(one.live_s if synchronous else one.snapshot_s + one.publish_wait_s for one in phases),
    )


def _control(trace: Trace, updates: Sequence[Call], window: Interval) -> ControlPlane:
    calls = [call for call in trace.calls if call.done and _ends_in(call, window)]
    pings = trace.pings_s or [0.0, 0.0]
    return ControlPlane(
        call_p50_s=median(pings),
        call_p99_s=quantiles(pings, n=100)[-1],
        messages_per_update=2 * len(calls) / len(updates),
        bytes_per_update=sum(call.num_bytes for call in calls) / len(updates),
        overhead_s=median(_overhead_s(trace, call) for call in updates),
    )


def _overhead_s(trace: Trace, update: Call) -> float:
    """What a call took beyond the work: the optimizer step, and the snapshot of the weights before, which the trainer
    may still be taking when the call comes."""
    snapshots = [(call.begin_s, call.begin_s + call.reply.snapshot_s) for call in trace.of("publish")]
    waited_s = length_s(snapshots, (update.begin_s, update.end_s))
    work_s: float = update.reply.duration_s
    return max(0.0, update.end_s - update.begin_s - waited_s - work_s)


def _start_up(trace: Trace, began_at: float) -> StartUp:
    def since_began_s(moment_s: float) -> float:
        return trace.opened_at + moment_s - trace.opened_s - began_at

    return StartUp(
        open_s=since_began_s(trace.opened_s),
        first_token_s=since_began_s(trace.of("generate")[0].end_s),
        first_update_s=since_began_s(trace.of("update")[0].end_s),
    )


def _rewards(updates: Sequence[Call]) -> tuple[RewardPoint, ...]:
    began_s = updates[0].begin_s
    return tuple(
        RewardPoint(
            update=call.reply.update,
            wall_s=call.end_s - began_s,
            mean_reward=call.reply.mean_reward,
            correct_rate=call.reply.correct_rate,
        )
        for call in updates
    )


def _timeline(trace: Trace, window: Interval) -> tuple[Span, ...]:
    spans = []
    for call in trace.calls:
        if call.method == "save" or not call.done or call.end_s <= window[0] or call.begin_s >= window[1]:
            continue
        spans.append(
            Span(
                role=call.part,
                kind=call.method,
                begin_s=call.begin_s - window[0],
                end_s=call.end_s - window[0],
                version=_version(call),
            )
        )
    return tuple(spans)


def _version(call: Call) -> int:
    """Of the weights that the work began with, or that it brings."""
    if call.method == "generate":
        return call.reply.oldest_version or 0
    version: int = call.request.version if call.method == "update" else call.reply.version
    return version
