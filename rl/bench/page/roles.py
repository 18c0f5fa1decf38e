"""Sections about what hosts the roles: start-up, the control plane, memory and processor time, the accounting."""

from rl.bench import metric as metrics
from rl.bench.metric import Metric
from rl.bench.numbers import cell_name, with_spread
from rl.bench.page.bars import Bar, bar_chart
from rl.bench.page.block import Figure, Legend, Section, Table, check, tables_by_mode
from rl.bench.page.svg import scale
from rl.bench.results import CellKey, Results
from rl.bench.spread import by_cell

_CONTROL = (metrics.CALL_P50, metrics.CALL_P99, metrics.MESSAGES, metrics.MESSAGE_BYTES, metrics.OVERHEAD)
_USAGE = (*metrics.MEMORY, *metrics.CPU)


def start_up_section(results: Results) -> Section:
    """From the start of the process to the first update."""
    bars, rows = [], []
    for key, runs in by_cell(results.runs).items():
        opened, token, update = (one.over(runs) for one in (metrics.OPEN, metrics.FIRST_TOKEN, metrics.FIRST_UPDATE))
        if opened is None or token is None or update is None:
            continue
        rows.append((cell_name(key), *(with_spread(one, "s") for one in (opened, token, update))))
        if key.workload == "tail":
            parts = [
                (opened.median, "c1", f"stack open after {with_spread(opened, 's')}"),
                (max(0.0, token.median - opened.median), "c2", f"first token after {with_spread(token, 's')}"),
                (max(0.0, update.median - token.median), "c3", f"first update after {with_spread(update, 's')}"),
            ]
            bars.append(Bar(cell_name(key), with_spread(update, "s").partition(" (")[0], "c1", parts))
    legend = [Legend("stack opens", "c1"), Legend("to the first token", "c2"), Legend("to the first update", "c3")]
    lengths = scale([sum(length for length, _, _ in bar.parts) for bar in bars], zero=True)
    figures = [Figure(bar_chart(bars, lengths), "From the start of the process", legend, wide=True)] if bars else []
    tables = [Table(("cell", "stack open", "first token", "first update"), rows)] if rows else []
    return Section("start-up", "Start-up", figures=figures, tables=tables)


def control_section(results: Results) -> Section:
    """What orchestration itself costs."""
    note = (
        "A call without work, from the loop to a hosted part and back; messages are requests and replies of one update."
    )
    return _metrics_section(results, "control", "Control plane", _CONTROL, note)


def usage_section(results: Results) -> Section:
    """Memory and processor time of each role."""
    note = "Of a role's processes together."
    return _metrics_section(results, "usage", "Memory and processor time per role", _USAGE, note)


def accounting_section(results: Results) -> Section:
    """Every run's tokens, with a mark."""
    rows = []
    for runs in by_cell(results.runs).values():
        for run in runs:
            one = run.accounting
            if one is not None:
                sums = (one.generated, one.trained, one.wasted, one.in_flight)
                counts = (one.consumed_trajectories, one.distinct_trajectories)
                rows.append(
                    (
                        f"{cell_name(run.key)}, seed {run.seed}{f', repeat {run.repeat}' if run.repeat else ''}",
                        *(f"{count:,}" for count in (*sums, *counts)),
                        check(one.balanced),
                    )
                )
    header = ("run", "generated", "trained", "wasted", "in flight", "samples consumed", "distinct", "adds up")
    note = "Tokens, from the first to the last update with warm-up: generated = trained + wasted + in flight. Samples "
    note += "consumed = distinct: none was trained on twice."
    good = sum(one.accounting.balanced for one in results.runs if one.accounting and not one.error)
    intro = f"{good} of {len(rows)} runs add up."
    return Section("accounting", "Accounting", intro, tables=[Table(header, rows, note=note)] if rows else [])


def _metrics_section(results: Results, id: str, title: str, columns: tuple[Metric, ...], note: str) -> Section:
    rows: list[tuple[CellKey, tuple[str, ...]]] = []
    for key, runs in by_cell(results.runs).items():
        found = [(metric.over(runs), metric.unit) for metric in columns]
        if any(one is not None for one, _ in found):
            rows.append((key, (cell_name(key), *(with_spread(one, unit) for one, unit in found))))
    header = ("cell", *(metric.title for metric in columns))
    return Section(id, title, tables=tables_by_mode(header, rows, note))
