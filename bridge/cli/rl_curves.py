"""`orchestrate rl curves`: what runs learned, side by side."""

import sys
from pathlib import Path

import click

from bridge.cli.failure import Failure
from bridge.cli.options import json_option
from bridge.cli.watch import Output
from bridge.terminal import columns, visible
from rl.run_curves import Curve, Point, plot_curves, read_curve


@click.command("curves")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--plot", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), help="Write a picture (PNG).")
@json_option
def curves(runs: tuple[Path, ...], plot: Path | None, as_json: bool) -> None:
    """Show how the accuracy on held-out questions rose in each RUN, a folder of `orchestrate rl train`.

    A rise is called significant where the 95 % intervals of the first and the last evaluation do not overlap.
    """
    try:
        found = [read_curve(run) for run in runs]
    except FileNotFoundError as error:
        raise Failure(str(error)) from error
    if plot is not None:
        if not plot.absolute().parent.is_dir():
            raise Failure(f"`{plot}`: there is no folder `{plot.absolute().parent}`")
        plot_curves(found, plot)
    if as_json:
        facts = [{**one.model_dump(mode="json"), "rise": one.rise, "significant": one.significant} for one in found]
        Output(as_json=True).print_json(facts)
        return
    header = ("MODEL", "TASK", "STACK", "SEED", "UPDATES", "SECONDS", "FIRST", "LAST", "RISE", "SIGNIFICANT")
    print("\n".join(columns(header, [_row(one) for one in found])))
    if plot is not None:
        print(f"\nplot: {visible(str(plot))}", file=sys.stderr)


def _row(curve: Curve) -> tuple[str, ...]:
    first, last = curve.points[0], curve.points[-1]
    return (
        curve.model,
        curve.task,
        curve.stack,
        str(curve.seed),
        str(last.version),
        f"{last.at_s:.0f}",
        _accuracy(first),
        _accuracy(last),
        f"{100 * curve.rise:+.1f} points",
        "yes" if curve.significant else "no",
    )


def _accuracy(point: Point) -> str:
    return f"{point.accuracy:.1%} ({point.interval.low:.0%} - {point.interval.high:.0%})"
