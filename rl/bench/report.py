"""The report of a benchmark: one HTML file that needs nothing else, on a screen, a phone or paper.

Results -> headline, tiles, targets, findings, sections -> page/page.html.j2 -> report.html
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from rl.bench import metric as metrics
from rl.bench.findings import findings, headline, main_cells
from rl.bench.numbers import cell_name, digits, size, times
from rl.bench.page.block import Section, Table, Tile
from rl.bench.page.learning import learning_section
from rl.bench.page.recovery import recovery_section
from rl.bench.page.roles import accounting_section, control_section, start_up_section, usage_section
from rl.bench.page.simulation import simulation_section
from rl.bench.page.speed import bound_section, speed_up_section, summary_section
from rl.bench.page.staleness import parity_section, staleness_section
from rl.bench.page.timeline import timeline_section
from rl.bench.page.weights import weights_section
from rl.bench.results import Results
from rl.bench.spread import by_cell, speed_ups, usual
from rl.bench.targets import targets

SECTIONS = (
    summary_section, bound_section, speed_up_section, learning_section, timeline_section, staleness_section,
    weights_section, control_section, start_up_section, usage_section, parity_section, accounting_section,
    recovery_section, simulation_section,
)  # fmt: skip
_BRACKETS = re.compile(r"(.+?) \((.+)\)")
_CODE = re.compile("`([^`]*)`")


def write_report(results: Results, path: Path) -> None:
    """Write the page, whole or not at all; what was not measured is said so in its section."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(page(results), encoding="utf-8")
    partial.replace(path)


def page(results: Results) -> str:
    """The report as HTML."""
    environment = Environment(
        loader=PackageLoader("rl.bench", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = _prose
    environment.filters["cell"] = _cell
    return environment.get_template("page.html.j2").render(
        results=results,
        headline=headline(results),
        tiles=list(_tiles(results)),
        targets=targets(results),
        findings=findings(results),
        sections=[*(make(results) for make in SECTIONS), _failures(results)],
        facts=list(_facts(results)),
        packages=sorted(results.machine.versions.items()),
        config=sorted((name, str(value)) for name, value in results.config.items()),
    )


def _tiles(results: Results) -> Iterator[Tile]:
    """The numbers of the cell that trains on most samples asynchronously, the one of the headline."""
    cells = main_cells(results)
    of = [key for key in cells if key.mode == "async" and usual(key)]
    rates = {key: found for key in of if (found := metrics.SAMPLES.over(cells[key]))}
    if not rates:
        return
    best = max(rates, key=lambda key: rates[key].median)
    name, faster = cell_name(best), speed_ups(cells, best)
    efficiency = metrics.EFFICIENCY.over(cells[best])
    yield Tile(value=digits(rates[best].median), label="samples/s", detail=name)
    if efficiency is not None:
        yield Tile(value=f"{efficiency.median:.2f}", label="of the bound", detail=name)
    if faster.split is not None:
        yield Tile(value=times(faster.split.median), label="over the same split", detail=name)
    if faster.colocated is not None:
        yield Tile(value=times(faster.colocated.median), label="over colocated", detail=name)


def _facts(results: Results) -> Iterator[tuple[str, str]]:
    machine = results.machine
    yield "machine", f"{machine.processor}, {machine.num_cores} cores, {size(machine.memory_bytes)}"
    yield "system", f"{machine.system}, Python {machine.python}"
    yield "measured", f"{results.started_at}, {_long(results.duration_s)}{', quick' if results.quick else ''}"
    if results.commit:
        yield "commit", results.commit[:12]
    loads = [run.load_before for run in results.runs]
    if loads:
        yield "load before a run", f"{min(loads):.1f} to {max(loads):.1f} (1 min average)"
    measured = by_cell(results.runs)
    if measured:
        counts = [len(runs) for runs in measured.values()]
        runs = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        yield "runs", f"{sum(counts)} in {len(measured)} cells, {runs} a cell, interleaved"
        yield "placement", ", ".join(dict.fromkeys(key.placement for key in measured))


def _failures(results: Results) -> Section:
    """What has no numbers, and why."""
    rows = [(cell_name(run.key), f"seed {run.seed}", run.error or "no update was measured")
            for run in results.runs if run.error or not run.num_updates]  # fmt: skip
    rows += [(f"calibration of {one.stack}, engine {one.engine}", f"seed {one.seed}", one.error)
             for one in results.calibrations if one.error]  # fmt: skip
    rows += [(f"{one.killed} of {one.stack} killed", f"seed {one.seed}", one.error)
             for one in results.recoveries if one.error]  # fmt: skip
    rows += [(f"transport {one.name}", size(one.num_bytes), one.error) for one in results.transports if one.error]
    table = Table(("what", "which", "why"), rows, words=True)
    return Section("failures", "What failed", tables=[table] if rows else [], missing="Nothing.")


def _long(duration_s: float) -> str:
    minutes, rest = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _cell(text: str | Markup) -> Markup:
    """What is in brackets at the end, a spread or a bound, on a line of its own."""
    found = None if isinstance(text, Markup) else _BRACKETS.fullmatch(text)
    return escape(text) if found is None else Markup("{} <small>{}</small>").format(*found.groups())


def _prose(text: str) -> Markup:
    """Names in backticks as code."""
    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(text))))
