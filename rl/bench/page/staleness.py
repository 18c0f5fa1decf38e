"""Section about staleness: how old the data was, what a bound on it costs, and how well both policies agree."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from rl.bench import metric as metrics
from rl.bench.numbers import cell_name, digits, mode_name, seconds, share, unusual
from rl.bench.page.bars import Bar, bar_chart
from rl.bench.page.block import NUM_COLOURS, Figure, Legend, Section, mode_colour, tables_by_mode
from rl.bench.page.plot import Line, plot
from rl.bench.page.svg import Scale, scale
from rl.bench.results import CellKey, CellRun, Mismatch, Results
from rl.bench.spread import Cells, Spread, by_cell, spread_of


def staleness_section(results: Results) -> Section:
    """Histogram and sweep."""
    cells = by_cell(results.runs)
    keys = [
        key for key, runs in cells.items() if key.workload == "tail" and any(any(run.staleness) for run in runs)
    ]  # fmt: skip
    figures = []
    for stack in dict.fromkeys(key.stack for key in keys):
        bars = [bar for key in keys if key.stack == stack for bar in _histogram(cells, key)]
        figures.append(Figure(bar_chart(bars, Scale(0.0, 1.0)), f"{stack}: groups by staleness"))
    intro = "Versions between the trainer's weights and the oldest that sampled a group, when it is trained on."
    sweep = list(_sweep(cells))
    return Section("staleness", "Staleness", intro, figures=[*sweep, *figures])


def parity_section(results: Results) -> Section:
    """Fresh and stale samples apart."""
    rows: list[tuple[CellKey, tuple[str, ...]]] = []
    for key, runs in by_cell(results.runs).items():
        for kind, of in (("fresh", [run.fresh for run in runs]), ("stale", [run.stale for run in runs])):
            known = [one for one in of if one is not None and one.num_tokens]
            if known:
                rows.append((key, (cell_name(key), kind, *_mismatch(known))))
    header = ("cell", "samples", "tokens", "k3-KL, nats", "effective sample size", "max difference, nats")
    note = "Trainer against sampler. Fresh samples are of the very weights that are trained, so what is left is the "
    note += (
        "arithmetic of two programs; stale ones are of older weights. Medians over runs, the difference is the largest."
    )
    return Section("parity", "Parity", tables=tables_by_mode(header, rows, note))


def _mismatch(known: Sequence[Mismatch]) -> tuple[str, str, str, str]:
    def middle(read: Callable[[Mismatch], float]) -> float:
        found = spread_of(read(one) for one in known)
        return found.median if found else 0.0

    return (
        f"{sum(one.num_tokens for one in known):,}",
        f"{middle(lambda one: one.k3_kl):.1e}",
        digits(middle(lambda one: one.effective_sample_size), 4),
        f"{max(one.max_difference for one in known):.1e}",
    )


def _histogram(cells: Cells, key: CellKey) -> Iterator[Bar]:
    counts = Counter(staleness for run in cells[key] for staleness in run.staleness)
    heading = mode_name(key) + unusual(key)
    for staleness in range(max(counts, default=-1) + 1):
        part = counts[staleness] / counts.total()
        yield Bar(
            str(staleness),
            share(part),
            mode_colour(key),
            [(part, mode_colour(key), f"{cell_name(key)}: {counts[staleness]} groups of staleness {staleness}")],
            heading=heading if staleness == 0 else "",
        )


def _sweep(cells: Cells) -> Iterator[Figure]:
    """By the bound on staleness, every stack a line: the cells with one core per role."""
    series: dict[str, dict[int, Sequence[CellRun]]] = {}
    for key, runs in cells.items():
        if key.workload == "tail" and key.mode != "sync-colocated":
            placement = f" ({key.placement})" if key.placement != "pinned" else ""
            series.setdefault(f"{key.stack}{unusual(key)}{placement}", {})[key.max_staleness] = runs
    series = {name: of for name, of in series.items() if len(of) > 2}
    if not series:
        return
    colours = {name: f"c{1 + place % (NUM_COLOURS - 1)}" for place, name in enumerate(series)}
    legend = [Legend(name, colours[name], "line") for name in series]
    bounds = scale([0, *(max(of) for of in series.values())])
    for metric, title, note, words in (
        (metrics.UPDATE_MEAN, "Time of an update by `max_staleness`", "0 is in turns, 1 one-step. Dashed: the bound.",
         seconds),
        (metrics.STALENESS_MEAN, "Mean staleness by `max_staleness`", "What it costs: how old the data is.",
         lambda value: digits(value, 2)),
    ):  # fmt: skip
        lines = [Line(name, colours[name], _points(of, metric)) for name, of in series.items()]
        if metric is metrics.UPDATE_MEAN:
            lines += [
                Line(f"{name}, bound", colours[name], _points(of, metrics.BOUND), dashed=True, marks=False)
                for name, of in series.items()
            ]
        lines = [line for line in lines if line.points]
        high = scale([spread.high for line in lines for _, spread in line.points], zero=True).rounded()
        drawing = plot(
            lines,
            bounds,
            high,
            x_title="max_staleness",
            x_format=_whole,
            x_ticks=sorted({at for of in series.values() for at in of}),
            y_format=words,
        )
        yield Figure(drawing, title, legend, note)


def _points(of: dict[int, Sequence[CellRun]], metric: metrics.Metric) -> list[tuple[float, Spread]]:
    return [(bound, found) for bound, runs in sorted(of.items()) if (found := metric.over(runs))]


def _whole(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else ""
