"""A number of a cell as the median of its runs with their spread, and how much faster one cell is than another.

    CellRun, ... -> by_cell -> {CellKey: runs} -> spread_of(values) -> Spread
                                              -> speed_ups(cells, key) -> SpeedUp over either synchronous baseline

The spread is the lowest and the highest run, not an interval of confidence: a cell has a handful of runs, and of three
nothing more can be said. Two medians differ beyond their spread where they lie further apart than both spreads
together; of two cells of three runs that are the same, about one pair in seventy does.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from rl.bench.results import CellKey, CellRun
from rl.types import Frozen

ASSUMED_SPREAD = 0.2
"""Of one run, whose spread is not known: the width of its range, as a share of the number."""
PEERS = ("trl",)
STACKS = ("local", "ray", "monarch", "hybrid", "trl")
MODES = ("sync-colocated", "sync", "one-step", "async")
PLACEMENTS = ("pinned", "emulated", "simulated")

Cells = Mapping[CellKey, Sequence[CellRun]]
"""The runs that did not fail, in order of seed and repeat."""


class Spread(Frozen):
    """Median, lowest and highest of `n` runs."""

    median: float
    low: float
    high: float
    n: int

    @property
    def width(self) -> float:
        """Of the range; assumed where there is one run only."""
        return self.high - self.low if self.n > 1 else ASSUMED_SPREAD * abs(self.median)

    def apart(self, other: "Spread") -> bool:
        """Whether the medians differ beyond the spread of both."""
        return abs(self.median - other.median) > self.width + other.width


class SpeedUp(Frozen):
    """How many times as many fresh samples a second as the baseline: the ratio of the medians, with the lowest and the
    highest ratio of two runs of the same seed and repeat. Samples, not updates: a cell that trains on less is not
    faster."""

    colocated: Spread | None
    """Over `sync-colocated`, which has all cores for both roles in turns."""
    split: Spread | None
    """Over `sync`, which has the same cores per role."""


def spread_of(values: Iterable[float | None]) -> Spread | None:
    """None where nothing was measured."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(median=statistics.median(known), low=min(known), high=max(known), n=len(known))


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which `share` of the values lie, interpolated; None of none."""
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = ordered[int(place)]
    return below + (ordered[min(int(place) + 1, len(ordered) - 1)] - below) * (place - int(place))


def by_cell(runs: Iterable[CellRun]) -> dict[CellKey, list[CellRun]]:
    """The runs that did not fail, cell by cell, in the order in which cells are shown."""
    good = sorted((run for run in runs if not run.error and run.num_updates), key=_order)
    return {key: list(same) for key, same in groupby(good, key=lambda run: run.key)}


def samples_per_s(run: CellRun) -> float | None:
    """Fresh trajectories that were trained on, by the second."""
    return run.trajectories / run.duration_s if run.duration_s > 0 else None


def usual(key: CellKey) -> bool:
    """Whether a cell is of the comparison proper: long-tailed lengths, the engine of its placement, no peer."""
    engine = "emulated" if key.placement == "emulated" else "vllm"
    return (key.workload, key.engine) == ("tail", engine) and key.stack not in PEERS


def baseline(key: CellKey, mode: str) -> CellKey:
    """The synchronous cell that a cell is measured against."""
    return key.model_copy(update={"mode": mode, "max_staleness": 0})


def speed_ups(cells: Cells, key: CellKey) -> SpeedUp:
    """Over both synchronous baselines of the same stack, engine, workload, placement and number of generators."""
    return SpeedUp(
        colocated=_speed_up(cells, key, baseline(key, "sync-colocated")),
        split=_speed_up(cells, key, baseline(key, "sync")),
    )


def ratio_of(above: Sequence[CellRun], below: Sequence[CellRun]) -> Spread | None:
    """Samples per second of one cell over those of another, by the runs of the same seed and repeat."""
    rates = {(run.seed, run.repeat): samples_per_s(run) for run in below}
    pairs = [(samples_per_s(run), rates.get((run.seed, run.repeat))) for run in above]
    known = [(mine, theirs) for mine, theirs in pairs if mine is not None and theirs]
    if not known:
        return None
    ratios = [mine / theirs for mine, theirs in known]
    medians = [statistics.median(side) for side in zip(*known, strict=True)]
    # Rounding may put a ratio of medians a hair outside.
    median = min(max(medians[0] / medians[1], min(ratios)), max(ratios))
    return Spread(median=median, low=min(ratios), high=max(ratios), n=len(known))


def _speed_up(cells: Cells, key: CellKey, below: CellKey) -> Spread | None:
    return None if key == below else ratio_of(cells.get(key, ()), cells.get(below, ()))


def _order(run: CellRun) -> tuple[object, ...]:
    return (*order_of(run.key), run.seed, run.repeat)


def order_of(key: CellKey) -> tuple[object, ...]:
    """Sorts cells as people read them."""
    return (
        _place(PLACEMENTS, key.placement),
        key.workload != "tail",
        _place(STACKS, key.stack),
        key.stack,
        key.engine != "vllm",
        key.engine,
        key.num_generators,
        _place(MODES, key.mode),
        key.max_staleness,
    )


def _place(known: Sequence[str], name: str) -> int:
    return known.index(name) if name in known else len(known)
