"""What runs learned: held-out accuracy as training goes on, read from the folders of runs, and its picture.

folders -> Curve (one of each run) -> plot_curves -> PNG
"""

import json
import os
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rl.evaluation import Interval
from rl.metrics import EVALUATIONS
from rl.run_folder import read_config
from rl.types import Frozen

_OF_CACHE = re.compile(r"-[0-9a-f]{12}$")
"""What folders in the cache of models have behind their name."""
_STYLES = ("-", "--", ":", "-.")


class Point(Frozen):
    """One evaluation on held-out prompts."""

    version: int
    """Of the weights: updates that are done."""
    at_s: float
    """Seconds of training, without those of evaluations, since the first one was over."""
    accuracy: float
    interval: Interval
    """95 %."""


class Curve(Frozen):
    """One run."""

    folder: str
    model: str
    task: str
    """Labels, joined where there are several."""
    stack: str
    seed: int
    points: tuple[Point, ...]

    @property
    def rise(self) -> float:
        """Of the accuracy, from the first evaluation to the last; 0 to 1."""
        return self.points[-1].accuracy - self.points[0].accuracy

    @property
    def significant(self) -> bool:
        """Whether the last interval lies above the first, so that they do not overlap."""
        return self.points[-1].interval.low > self.points[0].interval.high


def read_curve(folder: Path) -> Curve:
    """Raises FileNotFoundError where there is no run, or none that was evaluated yet."""
    config = read_config(folder)
    path = folder / EVALUATIONS
    lines = (
        [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    )
    if config is None or not lines:
        raise FileNotFoundError(
            f"`{folder}` has no run that was evaluated\n\nhint: `orchestrate rl train --evaluate-every 10` evaluates"
        )
    found = [json.loads(line) for line in lines]
    at_s, points = 0.0, []
    for before, line in pairwise([found[0], *found]):
        at_s += max(0.0, line["at"] - before["at"] - line["duration_s"])
        overall = line["report"]["overall"]
        points.append(
            Point(
                version=line["version"],
                at_s=at_s,
                accuracy=overall["accuracy"],
                interval=Interval.model_validate(overall["accuracy_interval"]),
            )
        )
    return Curve(
        folder=str(folder),
        model=_OF_CACHE.sub("", Path(config.model).name),
        task=", ".join(task.label for task in config.tasks),
        stack=config.stack,
        seed=config.seed,
        points=tuple(points),
    )


def plot_curves(curves: Sequence[Curve], path: Path) -> None:
    """Write a PNG: a column for each model and task, accuracy against updates above and against seconds below.

    Stacks have colours, seeds styles of line.
    """
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys((curve.model, curve.task) for curve in curves))
    stacks = list(dict.fromkeys(curve.stack for curve in curves))
    seeds = sorted({curve.seed for curve in curves})
    figure = Figure(figsize=(1.5 + 5 * len(columns), 7.5), layout="constrained")
    grid = figure.subplots(2, len(columns), sharey=True, squeeze=False)
    for column, wanted in enumerate(columns):
        of_column = [curve for curve in curves if (curve.model, curve.task) == wanted]
        for row, axes in enumerate(grid[:, column]):
            for curve in of_column:
                shares = [point.accuracy for point in curve.points]
                reach = [
                    [point.accuracy - point.interval.low for point in curve.points],
                    [point.interval.high - point.accuracy for point in curve.points],
                ]
                axes.errorbar(
                    [point.at_s if row else point.version for point in curve.points],
                    shares,
                    yerr=reach,
                    color=f"C{stacks.index(curve.stack)}",
                    marker="o",
                    markersize=3,
                    linewidth=1.2,
                    linestyle=_STYLES[seeds.index(curve.seed) % len(_STYLES)],
                    elinewidth=0.6,
                    capsize=2,
                    alpha=0.8,
                    label=curve.stack,
                )
            axes.set_ylim(0, 1.02)
            axes.grid(alpha=0.25)
            axes.set_xlabel("seconds of training" if row else "updates")
            axes.set_ylabel("" if column else "held-out accuracy")
        num_seeds = len({curve.seed for curve in of_column})
        of_seeds = f"{num_seeds} seed{'s' * (num_seeds != 1)}"
        grid[0, column].set_title(f"{wanted[0]} on {wanted[1]}, {of_seeds}, 95 % intervals")
        handles = dict(zip(*reversed(grid[0, column].get_legend_handles_labels()), strict=True))
        grid[0, column].legend(handles.values(), handles.keys(), loc="lower right")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(path)
