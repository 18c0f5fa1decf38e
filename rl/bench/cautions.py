"""What a reader must know before believing the numbers."""

from collections.abc import Iterator

from rl.bench import metric as metrics
from rl.bench.finding import Finding
from rl.bench.numbers import cell_name, digits, mode_name, share
from rl.bench.results import Results
from rl.bench.spread import ASSUMED_SPREAD, Cells


def cautions(results: Results, cells: Cells) -> Iterator[Finding]:
    single = [key for key, runs in cells.items() if len(runs) == 1]
    if single:
        yield Finding(
            about="caution",
            text=f"One run only in {len(single)} of {len(cells)} cells, so that the spread is not known: "
            f"{share(ASSUMED_SPREAD)} of the number are assumed.",
        )
    if results.quick:
        yield Finding(about="caution", text="These numbers are from a quick run and say little about the machine.")
    unbalanced = [
        cell_name(run.key) for runs in cells.values() for run in runs if run.accounting and not run.accounting.balanced
    ]
    if unbalanced:
        yield Finding(
            about="caution", text=f"The accounting does not add up in: {', '.join(dict.fromkeys(unbalanced))}."
        )
    beyond = [
        f"{cell_name(key)} {digits(found.median)}"
        for key, runs in cells.items()
        if (found := metrics.EFFICIENCY.over(runs)) and found.median > 1
    ]
    if beyond:
        yield Finding(
            about="caution",
            text=f"Faster than their bound, which a bound forbids, so the calibration was slower than the run: "
            f"{', '.join(beyond)}.",
        )
    uneven = _uneven(cells)
    if uneven:
        yield Finding(about="caution", text=f"Not the same number of samples per update in every cell: {uneven}.")


def _uneven(cells: Cells) -> str:
    counts: dict[float, list[str]] = {}
    for key, runs in cells.items():
        if key.workload == "tail":
            for run in runs:
                counts.setdefault(run.trajectories / run.num_updates, []).append(f"{key.stack} {mode_name(key)}")
    if len(counts) < 2:
        return ""
    return "; ".join(f"{digits(count)} in {', '.join(dict.fromkeys(names))}" for count, names in counts.items())
