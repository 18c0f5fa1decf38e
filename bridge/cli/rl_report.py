"""`orchestrate rl report`: the page and the table of results that are there already."""

from pathlib import Path

import click

from bridge.cli.failure import Failure
from bridge.cli.options import json_option
from bridge.cli.rl_compare import read
from bridge.cli.watch import Output


@click.command("report")
@click.argument("results", metavar="RESULTS.json", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="The page.  [default: beside RESULTS]")
@json_option
def report(results: Path, output: Path | None, as_json: bool) -> None:
    """Make the page of a benchmark anew from its RESULTS.json, and print its table (Markdown).

    With --json: the headline, whether each target was reached, and what follows for choosing a stack.
    """
    from rl.bench.findings import findings, headline
    from rl.bench.report import write_report
    from rl.bench.run import REPORT
    from rl.bench.table import table
    from rl.bench.targets import targets

    found = read(results)
    page = output or results.with_name(REPORT)
    try:
        write_report(found, page)
    except OSError as error:
        raise Failure(f"`{page}` cannot be written: {error.strerror or error}") from error
    if as_json:
        reached = [{**one.model_dump(mode="json"), "state": one.state} for one in targets(found)]
        follows = [one.model_dump(mode="json") for one in findings(found)]
        words = {"headline": headline(found), "targets": reached, "findings": follows}
        Output(as_json=True).print_json({"report": str(page), **words})
        return
    print(f"{table(found)}\n\nreport  {page}")
