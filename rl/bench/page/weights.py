"""Section about weights: what a change of weights costs in a run, and transports alone against a plain copy."""

from collections.abc import Iterator

from rl.bench import metric as metrics
from rl.bench.numbers import NOT_MEASURED, cell_name, number, seconds, size, times, with_spread
from rl.bench.page.bars import Bar, bar_chart
from rl.bench.page.block import NUM_COLOURS, Figure, Legend, Section, Table
from rl.bench.page.plot import Line, plot
from rl.bench.page.svg import scale
from rl.bench.results import Results, Transport
from rl.bench.spread import Cells, Spread, by_cell, spread_of
from rl.bench.targets import copy_ratios

_PARTS = ((metrics.SNAPSHOT, "c1"), (metrics.PUSH, "c2"), (metrics.PULL, "c3"), (metrics.RELOAD, "c4"))
_MORE = (metrics.PAUSE, metrics.EXPOSED, metrics.WEIGHTS_RATE)


def weights_section(results: Results) -> Section:
    """In runs, then alone."""
    cells = by_cell(results.runs)
    figures, tables = [], []
    bars = list(_bars(cells))
    if bars:
        lengths = scale([sum(length for length, _, _ in bar.parts) for bar in bars], zero=True)
        legend = [Legend(_short(metric), name) for metric, name in _PARTS]
        figures.append(Figure(bar_chart(bars, lengths), "From the trainer's memory into the engine", legend, wide=True))
        header = ("cell", "bytes", *(_short(metric) for metric, _ in _PARTS), *(_short(metric) for metric in _MORE))
        tables.append(Table(header, list(_rows(cells)), title="In the runs"))
    figures += list(_transports(results))
    ratios = copy_ratios(results)
    if ratios:
        names = list(dict.fromkeys(name for of in ratios.values() for name in of))
        rows = [
            (size(num_bytes), *(times(of[name]) if name in of else NOT_MEASURED for name in names))
            for num_bytes, of in ratios.items()
        ]
        tables.append(Table(("bytes", *names), rows, title="Time over that of a plain memory copy"))
    intro = (
        "The exposed share is what the trainer waits: for its snapshot, and for a publication before that is not done. "
        "A transport alone is timed from the trainer's memory until the other process can read all of it, the message "
        "that says so included, which is most of it for small weights."
    )
    return Section("weights", "Weights", intro, figures, tables)


def _bars(cells: Cells) -> Iterator[Bar]:
    # Every mode moves the same weights in the same way; asynchronous cells do it while the engine samples.
    modes = {key.mode for key in cells}
    for key, runs in cells.items():
        if "async" in modes and key.mode != "async":
            continue
        parts = []
        for metric, name in _PARTS:
            found = metric.over(runs)
            if found is not None:
                parts.append((found.median, name, f"{cell_name(key)}, {_short(metric)}: {with_spread(found, 's')}"))
        if parts and key.workload == "tail":
            yield Bar(cell_name(key), seconds(sum(length for length, _, _ in parts)), "c1", parts)


def _short(metric: metrics.Metric) -> str:
    return metric.title.removeprefix("weights: ")


def _rows(cells: Cells) -> Iterator[tuple[str, ...]]:
    for key, runs in cells.items():
        num_bytes = spread_of(run.weights.num_bytes if run.weights else None for run in runs)
        if num_bytes is not None:
            columns = (*(metric for metric, _ in _PARTS), *_MORE)
            found = [(metric.over(runs), metric.unit) for metric in columns]
            numbers = [number(one.median, unit) if one else NOT_MEASURED for one, unit in found]
            yield (cell_name(key), size(num_bytes.median), *numbers)


def _transports(results: Results) -> Iterator[Figure]:
    measured = [one for one in results.transports if one.seconds and not one.error]
    if not measured:
        return
    names = sorted(dict.fromkeys(one.name for one in measured), key=lambda name: name != "memory_copy")
    # The palette is finite; the limit alone is grey.
    colours = {name: f"c{0 if place == 0 else 1 + (place - 1) % (NUM_COLOURS - 1)}" for place, name in enumerate(names)}
    legend = [Legend(name, colours[name], "line") for name in names]
    sizes = scale([one.num_bytes for one in measured], log=True)
    took = {name: _points([one for one in measured if one.name == name], rate=False) for name in names}
    rates = {name: _points([one for one in measured if one.name == name], rate=True) for name in names}
    for title, of, words in (
        ("Seconds by size", took, seconds),
        ("Bytes a second by size", rates, lambda value: f"{size(value)}/s"),
    ):
        lines = [Line(name, colours[name], points, dashed=name == "memory_copy") for name, points in of.items()]
        high = scale([end for line in lines for _, one in line.points for end in (one.low, one.high)], log=True)
        drawing = plot(lines, sizes, high, x_title="bytes", x_format=size, y_format=words)
        yield Figure(drawing, f"Transports alone: {title[0].lower()}{title[1:]}", legend,
                     note="Both scales are logarithmic. Dashed: a plain copy in memory, the limit.")  # fmt: skip


def _points(of: list[Transport], *, rate: bool) -> list[tuple[float, Spread]]:
    found = []
    for one in sorted(of, key=lambda one: one.num_bytes):
        spread = spread_of(one.num_bytes / took if rate else took for took in one.seconds if took > 0)
        if spread is not None:
            found.append((float(one.num_bytes), spread))
    return found
