"""The summary of a benchmark as a table, for the README (Markdown) and for a terminal (rows of text).

Results -> summary -> header, rows -> table -> Markdown
"""

from collections.abc import Sequence

from rl.bench import metric as metrics
from rl.bench.metric import Metric
from rl.bench.numbers import (
    NOT_MEASURED,
    mode_name,
    number,
    plain,
    seconds,
    share,
    times_with_spread,
    unusual,
    with_spread,
)
from rl.bench.results import CellKey, CellRun, Results
from rl.bench.spread import by_cell, speed_ups

HEADER = (
    "cell", "update p50", "p95", "samples/s", "tokens/s per core", "of its bound", "vs colocated", "vs same split",
    "staleness mean / p95", "idle trainer / generator", "weights exposed",
)  # fmt: skip


def summary(results: Results) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: one row a cell, medians over its runs, with the lowest and the highest where it says most."""
    cells = by_cell(results.runs)
    rows: list[tuple[str, ...]] = []
    for key, runs in cells.items():
        faster = speed_ups(cells, key)
        rows.append(
            (
                _name(key),
                with_spread(metrics.UPDATE_P50.over(runs), "s"),
                _median(metrics.UPDATE_P95, runs),
                with_spread(metrics.SAMPLES.over(runs)),
                _median(metrics.TRAINED, runs),
                _of_bound(runs),
                times_with_spread(faster.colocated),
                times_with_spread(faster.split),
                _pair(metrics.STALENESS_MEAN, metrics.STALENESS_P95, runs),
                _pair(metrics.TRAINER_IDLE, metrics.GENERATOR_IDLE, runs),
                _median(metrics.EXPOSED, runs),
            )
        )
    rows += [(_name(key), "failed", *[NOT_MEASURED] * (len(HEADER) - 2)) for key in failed_cells(results)]
    return HEADER, rows


def table(results: Results) -> str:
    """Markdown, with a line above that says what the numbers are."""
    header, rows = summary(results)
    if not rows:
        return f"{caption(results)}\n\nNo cell was measured."
    lines = [header, tuple("---" if place == 0 else "---:" for place in range(len(header))), *rows]
    return "\n".join([caption(results), "", *[f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines]])


def caption(results: Results) -> str:
    """How many runs, where, and what the brackets mean."""
    counts = [len(runs) for runs in by_cell(results.runs).values()]
    least, most = min(counts, default=0), max(counts, default=0)
    runs = str(most) if least == most else f"{least}-{most}"
    machine = results.machine
    return (
        f"Median of {runs} run{'s' * (runs != '1')} a cell (lowest-highest); of its bound: bound over mean update time "
        f"(the bound); a speed-up is a ratio of samples/s. {machine.num_cores} cores of {machine.processor}, "
        f"{results.started_at[:10]}{f', commit {results.commit[:9]}' if results.commit else ''}"
        f"{', a quick run' if results.quick else ''}."
    )


def failed_cells(results: Results) -> list[CellKey]:
    """Those that have no run at all that did not fail."""
    measured = by_cell(results.runs)
    return list(dict.fromkeys(run.key for run in results.runs if run.key not in measured))


def _name(key: CellKey) -> str:
    return f"{key.stack} {mode_name(key)}{unusual(key)} ({key.placement})"


def _of_bound(runs: Sequence[CellRun]) -> str:
    of, bound = metrics.EFFICIENCY.over(runs), metrics.BOUND.over(runs)
    return NOT_MEASURED if of is None or bound is None else f"{of.median:.2f} ({seconds(bound.median)})"


def _median(metric: Metric, runs: Sequence[CellRun]) -> str:
    found = metric.over(runs)
    return NOT_MEASURED if found is None else number(found.median, metric.unit)


def _pair(first: Metric, second: Metric, runs: Sequence[CellRun]) -> str:
    found = [(one.over(runs), one.unit) for one in (first, second)]
    shown = [
        NOT_MEASURED if spread is None else share(spread.median) if unit == "share" else plain(spread.median)
        for spread, unit in found
    ]
    return NOT_MEASURED if set(shown) == {NOT_MEASURED} else " / ".join(shown)


def _escaped(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
