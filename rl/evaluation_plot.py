"""The picture of an evaluation: accuracy with its interval, and why conversations failed."""

import os
from pathlib import Path

from rl.evaluation import FAILURE_MODES, EvaluationReport
from rl.types import FailureMode

_COLOURS: dict[FailureMode, str] = {
    "success": "#2a9d8f",
    "wrong_answer": "#e9c46a",
    "wrong_format": "#f4a261",
    "tool_spam": "#e76f51",
    "truncated": "#8d99ae",
}


def plot_evaluation(reports: list[EvaluationReport], path: Path) -> None:
    """Write a PNG: the reports (e.g. before and after training) side by side, task by task."""
    # Here, since the figures of an evaluation need no matplotlib.
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(tally.label for report in reports for tally in (*report.tasks, report.overall)))
    figure = Figure(figsize=(max(7.0, 1.2 * len(labels) * len(reports)), 7.0), layout="constrained")
    accuracy, modes = figure.subplots(2, 1, sharex=True)
    width = 0.8 / max(1, len(reports))
    for place, report in enumerate(reports):
        name = report.model if report.version is None else f"{report.model}, version {report.version}"
        tallies = [tally for tally in (*report.tasks, report.overall) if tally.num_samples]
        at = [labels.index(tally.label) + (place - (len(reports) - 1) / 2) * width for tally in tallies]
        shares = [tally.accuracy for tally in tallies]
        reach = [
            [share - tally.accuracy_interval.low for share, tally in zip(shares, tallies, strict=True)],
            [tally.accuracy_interval.high - share for share, tally in zip(shares, tallies, strict=True)],
        ]
        accuracy.bar(at, shares, width * 0.9, yerr=reach, capsize=3, label=f"{name} (n = {report.overall.num_samples})")
        below = [0.0] * len(tallies)
        for mode in FAILURE_MODES:
            part = [tally.failure_modes[mode] / tally.num_samples for tally in tallies]
            label = mode.replace("_", " ") if place == 0 else None
            modes.bar(at, part, width * 0.9, bottom=below, color=_COLOURS[mode], label=label)
            below = [low + more for low, more in zip(below, part, strict=True)]
    accuracy.set_ylabel("accuracy")
    accuracy.set_title(f"accuracy with its {reports[0].confidence:.0%} interval" if reports else "accuracy")
    modes.set_ylabel("share of conversations")
    modes.set_xticks(range(len(labels)), labels)
    for axes in (accuracy, modes):
        axes.set_ylim(0, 1)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(path)
