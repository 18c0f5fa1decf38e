"""Sections about speed: the summary, what was measured against what is possible, and asynchronous against in turns."""

from collections.abc import Iterator

from rl.bench import metric as metrics
from rl.bench.metric import Metric
from rl.bench.numbers import cell_name, mode_name, seconds, times_with_spread, unusual, with_spread
from rl.bench.page.bars import Bar, Range, bar_chart, range_chart
from rl.bench.page.block import Figure, Legend, Section, Table, mode_colour, mode_legend
from rl.bench.page.svg import scale
from rl.bench.results import CellKey, Results
from rl.bench.spread import Cells, by_cell, speed_ups
from rl.bench.table import caption, summary

_MORE = (
    metrics.GENERATED,
    metrics.OVERLAP,
    metrics.STALENESS_MAX,
    metrics.VERSIONS,
    metrics.WASTED,
)


def summary_section(results: Results) -> Section:
    """One row a cell."""
    header, rows = summary(results)
    cells = by_cell(results.runs)
    more = [(cell_name(key), *(_shown(metric, cells, key) for metric in _MORE)) for key in cells]
    tables = [Table(header, rows, note=caption(results), open=True)] if rows else []
    tables += (
        [Table(("cell", *(metric.title for metric in _MORE)), more, title="More of the same cells")] if more else []
    )
    return Section("summary", "Summary", tables=tables)


def bound_section(results: Results) -> Section:
    """Bars of the update time with a line where the bound is."""
    cells = by_cell(results.runs)
    numbers = [metric.over(runs) for runs in cells.values() for metric in (metrics.UPDATE_MEAN, metrics.BOUND)]
    longest = [found.high for found in numbers if found is not None]
    lengths = scale([*longest, 0.0], zero=True)
    figures = []
    for workload in dict.fromkeys((key.placement, key.workload) for key in cells):
        keys = [key for key in cells if (key.placement, key.workload) == workload]
        drawing = bar_chart(list(_bound_bars(cells, keys)), lengths)
        placement, name = workload
        what = {"tail": "long-tailed lengths, the same work in every cell", "task": "real conversations"}[name]
        legend = [*mode_legend(keys), Legend("bound", "ink", "bound")]
        figures.append(Figure(drawing, f"Mean time of an update: {placement}, {what}", legend, wide=True))
    formulas = dict.fromkeys(
        (key.mode, run.bound.formula) for key, runs in cells.items() for run in runs if run.bound is not None
    )
    note = "Bounds are made of calls that were measured alone. A cell without a line has no bound: a peer, or real "
    note += "conversations, whose work changes as the policy learns."
    tables = [Table(("mode", "bound"), list(formulas), note=note, words=True)] if formulas else []
    return Section("bound", "Bound and measured", figures=figures, tables=tables)


def speed_up_section(results: Results) -> Section:
    """Dots of the ratios over both baselines."""
    cells = by_cell(results.runs)
    rows: dict[str, list[Range]] = {"split": [], "colocated": []}
    for key in cells:
        faster = speed_ups(cells, key)
        for name, ratio in (("split", faster.split), ("colocated", faster.colocated)):
            if ratio is not None and key.mode != "sync-colocated" and (key.mode, name) != ("sync", "split"):
                rows[name].append(Range(cell_name(key), times_with_spread(ratio), mode_colour(key), ratio))
    titles = {
        "split": "Over the same split: one core per role, in turns",
        "colocated": "Over colocated: all cores for both roles, in turns",
    }
    ends = [end for of in rows.values() for row in of for end in (row.spread.low, row.spread.high)]
    places = scale([*ends, 0.9, 1.1], room=0.03)
    figures = [
        Figure(range_chart(of, places, 1.0), titles[name], [Legend("equal", "ink", "bound")], wide=True)
        for name, of in rows.items()
        if of
    ]
    intro = "Ratio of fresh samples a second, of runs of the same seed: a cell that trains on less is not faster."
    return Section("speed-up", "Speed-up over both synchronous baselines", intro, figures)


def _bound_bars(cells: Cells, keys: list[CellKey]) -> Iterator[Bar]:
    before = None
    for key in keys:
        took = metrics.UPDATE_MEAN.over(cells[key])
        if took is None:
            continue
        bound = metrics.BOUND.over(cells[key])
        of = metrics.EFFICIENCY.over(cells[key])
        number = seconds(took.median) + (f" · {of.median:.2f} of {seconds(bound.median)}" if of and bound else "")
        group = f"{key.stack}{unusual(key).removesuffix(' task')}"
        yield Bar(
            mode_name(key),
            number,
            mode_colour(key),
            [(took.median, mode_colour(key), f"{cell_name(key)}: {with_spread(took, 's')}")],
            took,
            bound.median if bound else None,
            group if group != before else "",
        )
        before = group


def _shown(metric: Metric, cells: Cells, key: CellKey) -> str:
    return with_spread(metric.over(cells[key]), metric.unit)
