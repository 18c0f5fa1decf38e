"""`orchestrate rl compare`: whether a benchmark got worse, beyond the spread.

A.json, B.json -> read_results -> compare -> table or JSON; exit code 1 where something got worse
"""

import sys
from pathlib import Path
from typing import get_args

import click

from bridge.cli.failure import FAILED, Failure
from bridge.cli.options import json_option
from bridge.cli.watch import Output
from bridge.terminal import columns, terminal_width, visible
from rl.bench.compare import Change, Comparison, ResultsError, Verdict, compare, read_results
from rl.bench.numbers import with_spread
from rl.bench.results import Results

_RESULTS = click.Path(path_type=Path)
_COLOURS = {"regression": "red", "improvement": "green", "changed": "yellow"}


@click.command("compare")
@click.argument("before", metavar="A.json", type=_RESULTS)
@click.argument("after", metavar="B.json", type=_RESULTS)
@click.option("--all", "show_all", is_flag=True, help="Show the numbers that stayed within the spread too.")
@json_option
def compare_results(before: Path, after: Path, show_all: bool, as_json: bool) -> None:
    """Compare the benchmark results A.json (before) and B.json (after), cell by cell and metric by metric.

    A change counts where the medians lie further apart than the spreads (highest - lowest run) of both together, and
    more than 2 %. Of a single run the spread is not known: 20 % of the number are assumed. Different settings,
    machines and packages are warned of.

    Exit codes: 0 nothing got worse, 1 something got worse or failed that did not before, 2 a file cannot be read or
    has another schema version.
    """
    first, second = read(before), read(after)
    found = compare(first, second)
    regressions = found.of("regression")
    if as_json:
        Output(as_json=True).print_json({**found.model_dump(mode="json"), "regressions": len(regressions)})
    else:
        for warning in found.warnings:
            click.echo(f"{click.style('warning', fg='yellow')}: {visible(warning)}", err=True)
        print("\n".join(_screen(found, show_all)))
    if regressions or found.lost:
        sys.exit(FAILED)


def read(path: Path) -> Results:
    """The results in a file. Raises `Failure`."""
    try:
        return read_results(path)
    except ResultsError as error:
        raise Failure(*error.args) from None


def _screen(found: Comparison, show_all: bool) -> list[str]:
    order = ("regression", "improvement", "changed", *(("within spread",) if show_all else ()))
    shown: list[Change] = [change for verdict in order for change in found.changes if change.verdict == verdict]
    lines = columns(("VERDICT", "CHANGE", "CELL", "METRIC", "BEFORE", "AFTER"), [_row(one) for one in shown])
    lines = [_coloured(line) for line in lines] if shown else []
    for words, subjects in (
        ("failed in the second", found.lost),
        ("only in the first", found.only_before),
        ("only in the second", found.only_after),
    ):
        if subjects:
            lines.append(f"{words}: {', '.join(visible(subject) for subject in subjects)}")
    counts = {verdict: len(found.of(verdict)) for verdict in get_args(Verdict)}
    if not found.changes:
        return [*lines, "nothing to compare: the results have no cell in common"]
    plural = "s" * (counts["regression"] != 1)
    total = f"{counts['regression']} regression{plural}, {counts['improvement']} better, {counts['changed']} changed, "
    return [*lines, *[""] * bool(lines), f"{total}{counts['within spread']} within the spread"]


def _row(change: Change) -> tuple[str, ...]:
    before, after = with_spread(change.before, change.unit), with_spread(change.after, change.unit)
    share = "new" if change.change is None else f"{change.change:+.1%}"
    return (change.verdict, share, change.subject, change.metric, before, after)


def _coloured(line: str) -> str:
    for verdict, colour in _COLOURS.items():
        if line.startswith(verdict) and terminal_width(sys.stdout):
            return click.style(verdict, fg=colour) + line.removeprefix(verdict)
    return line
