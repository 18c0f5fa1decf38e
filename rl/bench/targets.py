"""What the benchmark has to reach, against what it measured: every target with its parts, and the number of each.

Results -> targets -> Target(reached | partly | missed | not measured)
"""

from collections.abc import Callable, Iterator
from typing import Literal

from rl.bench import metric as metrics
from rl.bench.metric import Metric
from rl.bench.numbers import cell_name, digits, number, seconds, share, size, times, times_with_spread, with_spread
from rl.bench.results import CellKey, Results
from rl.bench.spread import PEERS, Cells, by_cell, percentile, ratio_of, spread_of, usual
from rl.types import Frozen

ASYNC_EFFICIENCY = 0.95
SYNC_DISTANCE = 0.05
COPY_RATIO = 1.2
PAUSE_SHARE = 0.01
"""Of an update; a pause below is none."""
EXPOSED_SHARE = 0.05
OVERHEAD_SHARE = 0.03
GENERATOR_BACK_S = 5.0
TRAINER_BACK_S = 20.0

State = Literal["reached", "partly", "missed", "not measured"]


class Part(Frozen):
    """One cell's (size's, stack's) share in a target."""

    label: str
    number: str
    reached: bool


class Target(Frozen):
    """What was to be reached, and whether it was; medians decide."""

    name: str
    wanted: str
    parts: tuple[Part, ...] = ()

    @property
    def state(self) -> State:
        """`partly` where some parts reach it and others do not."""
        if not self.parts:
            return "not measured"
        reached = [part.reached for part in self.parts]
        return "reached" if all(reached) else "partly" if any(reached) else "missed"

    @property
    def missed(self) -> tuple[Part, ...]:
        """The parts that do not reach it."""
        return tuple(part for part in self.parts if not part.reached)


def targets(results: Results) -> tuple[Target, ...]:
    """All, in the order in which they were set."""
    cells = by_cell(results.runs)
    return (
        Target(
            name="Async reaches its bound",
            wanted=f"at least {ASYNC_EFFICIENCY} of the bound, one core per role, long-tailed lengths, on every stack",
            parts=_judged(cells, metrics.EFFICIENCY, _async_pinned, lambda value: value >= ASYNC_EFFICIENCY),
        ),
        Target(
            name="Sync follows its formula",
            wanted=f"within {share(SYNC_DISTANCE)} of the formula",
            parts=tuple(_formula(cells)),
        ),
        Target(
            name="Weight transport",
            wanted=f"at most {COPY_RATIO}x a memory copy of the same bytes, by the fastest transport, at every size",
            parts=tuple(_copies(results)),
        ),
        Target(
            name="No pause of generation",
            wanted=f"none, that is under {share(PAUSE_SHARE)} of the update time",
            parts=_judged(cells, PAUSE_OF_UPDATE, _async_pinned, lambda value: value < PAUSE_SHARE),
        ),
        Target(
            name="Exposed share of the weights",
            wanted=f"under {share(EXPOSED_SHARE)} of the update time",
            parts=_judged(cells, metrics.EXPOSED, _async_pinned, lambda value: value < EXPOSED_SHARE),
        ),
        Target(
            name="Control-plane overhead",
            wanted=f"under {share(OVERHEAD_SHARE)} of the update time",
            parts=_judged(cells, metrics.OVERHEAD, _tail_pinned, lambda value: value < OVERHEAD_SHARE),
        ),
        Target(
            name="TRL with the same engine",
            wanted="at least TRL's samples/s with the engine HF; the best mode of this loop counts",
            parts=tuple(_peers(cells)),
        ),
        Target(
            name="A generator comes back",
            wanted=f"in under {digits(GENERATOR_BACK_S, 1)} s, nothing lost, nothing doubled",
            parts=tuple(_recovered(results, "generator", GENERATOR_BACK_S)),
        ),
        Target(
            name="The trainer comes back",
            wanted=f"in under {digits(TRAINER_BACK_S, 2)} s from the checkpoint, nothing lost, nothing doubled",
            parts=tuple(_recovered(results, "trainer", TRAINER_BACK_S)),
        ),
    )


PAUSE_OF_UPDATE = Metric("pause_share", "pause, of an update", "share", "lower", metrics.pause_share)


def _tail_pinned(key: CellKey) -> bool:
    return key.placement == "pinned" and usual(key)


def _async_pinned(key: CellKey) -> bool:
    return _tail_pinned(key) and key.mode == "async"


def _judged(
    cells: Cells, metric: Metric, counts: Callable[[CellKey], bool], reached: Callable[[float], bool]
) -> tuple[Part, ...]:
    found = [(key, metric.over(runs)) for key, runs in cells.items() if counts(key)]
    return tuple(
        Part(label=cell_name(key), number=_number(metric, value.median), reached=reached(value.median))
        for key, value in found
        if value is not None
    )


def _number(metric: Metric, value: float) -> str:
    return f"{value:.3f}" if metric is metrics.EFFICIENCY else number(value, metric.unit)


def _formula(cells: Cells) -> Iterator[Part]:
    for key, runs in cells.items():
        of = metrics.EFFICIENCY.over(runs) if _tail_pinned(key) and key.mode in ("sync", "sync-colocated") else None
        if of is not None and of.median > 0:
            above = 1 / of.median - 1
            yield Part(
                label=cell_name(key),
                number=f"{share(abs(above))} {'above' if above >= 0 else 'below'}",
                reached=abs(above) <= SYNC_DISTANCE,
            )


def _copies(results: Results) -> Iterator[Part]:
    for num_bytes, ratios in copy_ratios(results).items():
        fastest = min(ratios, key=lambda name: ratios[name])
        yield Part(
            label=f"{size(num_bytes)} by {fastest}",
            number=times(ratios[fastest]),
            reached=ratios[fastest] <= COPY_RATIO,
        )


def copy_ratios(results: Results) -> dict[int, dict[str, float]]:
    """Size in bytes -> transport -> its median time over that of a plain memory copy."""
    medians = {
        (one.name, one.num_bytes): percentile(one.seconds, 0.5)
        for one in results.transports
        if one.seconds and not one.error
    }
    found: dict[int, dict[str, float]] = {}
    for (name, num_bytes), median in sorted(medians.items(), key=lambda pair: pair[0][1]):
        copy = medians.get(("memory_copy", num_bytes))
        if name != "memory_copy" and copy and median is not None:
            found.setdefault(num_bytes, {})[name] = median / copy
    return found


def _peers(cells: Cells) -> Iterator[Part]:
    for peer, theirs in cells.items():
        if peer.stack not in PEERS or peer.engine != "hf":
            continue
        same = [
            (ratio, key)
            for key, runs in cells.items()
            if key.stack not in PEERS and (key.engine, key.workload) == (peer.engine, peer.workload)
            if (ratio := ratio_of(runs, theirs)) is not None
        ]
        if same:
            best, key = max(same, key=lambda pair: pair[0].median)
            label = f"{cell_name(key)} over {cell_name(peer)}"
            yield Part(label=label, number=times_with_spread(best), reached=best.median >= 1)


def _recovered(results: Results, killed: str, limit_s: float) -> Iterator[Part]:
    of = [one for one in results.recoveries if one.killed == killed]
    for stack in dict.fromkeys(one.stack for one in of):
        runs = [one for one in of if one.stack == stack]
        whole = [one for one in runs if not one.error]
        back = spread_of(one.back_s for one in whole)
        lost, doubled = sum(one.samples_lost for one in whole), sum(one.samples_doubled for one in whole)
        failed = len(runs) - len(whole)
        words = [with_spread(back, "s")] if back else []
        words += [f"{lost} lost"] * (lost > 0) + [f"{doubled} doubled"] * (doubled > 0)
        words += [f"{failed} of {len(runs)} failed"] * (failed > 0)
        reached = back is not None and back.median < limit_s and not (lost or doubled or failed)
        yield Part(label=stack, number=", ".join(words) or seconds(0), reached=reached)
