"""Section about the reward: against updates and against wall time, stack by stack."""

from collections.abc import Sequence

from rl.bench.findings import final_reward
from rl.bench.numbers import cell_name, digits, seconds, with_spread
from rl.bench.page.block import Figure, Section, Table, mode_colour, mode_legend
from rl.bench.page.plot import Line, plot
from rl.bench.page.svg import scale
from rl.bench.results import CellKey, CellRun, Results
from rl.bench.spread import Cells, Spread, by_cell, spread_of

_PLACES = 60
_SMOOTHED = 0.1
"""Share of a run's updates that are averaged into one point."""


def learning_section(results: Results) -> Section:
    """Curves of the cells with real conversations."""
    cells = {
        key: runs
        for key, runs in by_cell(results.runs).items()
        if key.workload == "task" and any(len(run.rewards) > 1 for run in runs)
    }
    if not cells:
        return Section("learning", "Reward")
    runs = [run for of in cells.values() for run in of if run.rewards]
    rewards = scale([0.0, *(value for run in runs for _, value in smooth(run))], room=0.02).rounded()
    updates = scale([0, max(run.rewards[-1].update for run in runs)])
    wall = scale([0.0, max(run.rewards[-1].wall_s for run in runs)])
    figures = []
    for stack in dict.fromkeys(key.stack for key in cells):
        keys = [key for key in cells if key.stack == stack]
        legend = mode_legend(keys)
        by_update = plot(_curves(cells, keys, wall=False), updates, rewards,
                         x_title="updates", x_format=lambda at: f"{at:.0f}", y_format=_reward)  # fmt: skip
        by_wall = plot(_curves(cells, keys, wall=True), wall, rewards,
                       x_title="since the first update began", x_format=seconds, y_format=_reward)  # fmt: skip
        figures.append(Figure(by_update, f"{stack}: mean reward by updates", legend))
        figures.append(Figure(by_wall, f"{stack}: mean reward by wall time", legend))
    rows = [
        (
            cell_name(key),
            with_spread(spread_of(final_reward(run) for run in of)),
            with_spread(spread_of(run.rewards[-1].wall_s if run.rewards else None for run in of), "s"),
        )
        for key, of in cells.items()
    ]
    table = Table(("cell", "reward of the last fifth", "wall time"), rows)
    intro = f"Real conversations. A point is the mean of {_SMOOTHED:.0%} of a run's updates; the line is the median of "
    intro += "the seeds, the band reaches from the lowest to the highest."
    return Section("learning", "Reward", intro, figures, [table])


def smooth(run: CellRun) -> list[tuple[float, float]]:
    """Wall time and reward, by update: the mean of the last updates before it."""
    wide = max(1, round(len(run.rewards) * _SMOOTHED))
    values = [point.mean_reward for point in run.rewards]
    means = [sum(part) / len(part) for at in range(len(values)) if (part := values[max(0, at - wide + 1) : at + 1])]
    return [(point.wall_s, mean) for point, mean in zip(run.rewards, means, strict=True)]


def _curves(cells: Cells, keys: list[CellKey], *, wall: bool) -> list[Line]:
    lines = []
    for key in keys:
        runs = [run for run in cells[key] if len(run.rewards) > 1]
        points = _over_wall(runs) if wall else _over_updates(runs)
        lines.append(Line(cell_name(key), mode_colour(key), points, marks=False))
    return lines


def _over_updates(runs: Sequence[CellRun]) -> list[tuple[float, Spread]]:
    at: dict[int, list[float]] = {}
    for run in runs:
        for point, (_, value) in zip(run.rewards, smooth(run), strict=True):
            at.setdefault(point.update, []).append(value)
    return [(update, found) for update in sorted(at) if (found := spread_of(at[update]))]


def _over_wall(runs: Sequence[CellRun]) -> list[tuple[float, Spread]]:
    """At equal times, up to where the first run ended."""
    curves = [smooth(run) for run in runs]
    if not curves:
        return []
    begin, end = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    times = [begin + (end - begin) * place / _PLACES for place in range(_PLACES + 1)]
    return [(at, found) for at in times if (found := spread_of(_value(curve, at) for curve in curves))]


def _value(curve: list[tuple[float, float]], at: float) -> float:
    """Of the last point that is not later."""
    return next((value for time, value in reversed(curve) if time <= at), curve[0][1])


def _reward(value: float) -> str:
    return digits(round(value, 6), 2)
