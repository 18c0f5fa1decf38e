"""Section with the timeline: every role of a run, each piece of work in the colour of its weight version.

CellRun.timeline -> lanes (pieces that overlap get rows of their own) -> SVG
"""

from collections.abc import Iterable, Sequence

from markupsafe import Markup

from rl.bench.numbers import cell_name, seconds
from rl.bench.page.block import NUM_VERSION_COLOURS, Figure, Legend, Section
from rl.bench.page.svg import Scale, colour, joined, percent, short, tag
from rl.bench.results import CellRun, Results, Span
from rl.bench.spread import by_cell

_LANE, _LEAST_LANE, _ROLE, _BELOW = 16.0, 4.0, 30.0, 20


def timeline_section(results: Results) -> Section:
    """One run of each cell with long-tailed lengths, the ones of a stack on one scale of time."""
    shown = [run for runs in by_cell(results.runs).values() if (run := _longest(runs)) and run.key.workload == "tail"]
    figures = []
    for kind in dict.fromkeys((run.key.stack, run.key.placement, run.key.engine) for run in shown):
        runs = [run for run in shown if (run.key.stack, run.key.placement, run.key.engine) == kind]
        # The shortest decides: more of the longer ones shows nothing else.
        until = Scale(0.0, min(max(span.end_s for span in run.timeline) for run in runs))
        versions = sorted({span.version for run in runs for span in run.timeline if span.begin_s < until.high})
        legend = [Legend(f"version {version}", _version(version)) for version in versions[: 2 * NUM_VERSION_COLOURS]]
        drawing = joined(
            tag("div", tag("h4", cell_name(run.key)), *_roles(run.timeline, until), class_="timeline") for run in runs
        ) + _axis(until)
        placement = f" ({kind[1]})" if kind[1] != "pinned" else ""
        engine = f", engine {kind[2]}" if kind[2] not in ("vllm", kind[1]) else ""
        figures.append(Figure(drawing, f"{kind[0]}{engine}{placement}", legend, wide=True))
    intro = "The first measured updates. Full height: updates of the trainer, and groups that a generator samples, "
    intro += "each in the colour of the weights that it began with; thin: weights on their way. Point at a piece to "
    intro += "read what it is."
    return Section("timeline", "Timeline", intro, figures)


def lanes(spans: Iterable[Span]) -> list[list[Span]]:
    """Rows in which no two overlap: each goes to the first row that is free."""
    rows: list[list[Span]] = []
    for span in sorted(spans, key=lambda one: (one.begin_s, one.end_s)):
        row = next((row for row in rows if row[-1].end_s <= span.begin_s), None)
        if row is None:
            rows.append([span])
        else:
            row.append(span)
    return rows


def _longest(runs: Sequence[CellRun]) -> CellRun | None:
    """The first with a timeline."""
    return next((run for run in runs if run.timeline), None)


def _roles(timeline: Sequence[Span], until: Scale) -> list[Markup]:
    inside = [span for span in timeline if span.begin_s < until.high]
    roles = sorted({span.role for span in inside}, key=lambda role: (role != "trainer", len(role), role))
    return [_role(role, [span for span in inside if span.role == role], until) for role in roles]


def _role(role: str, spans: Sequence[Span], until: Scale) -> Markup:
    work = lanes(span for span in spans if span.kind in ("update", "generate"))
    passing = [span for span in spans if span.kind in ("publish", "load")]
    lane = max(_LEAST_LANE, _ROLE / max(1, len(work))) if len(work) > 1 else _LANE
    height = max(_LANE, lane * len(work)) + 8
    parts = [tag("rect", x=0, y=0, width="100%", height=height, rx=2, class_="track")]
    for number, row in enumerate(work):
        parts += [_piece(span, until, number * lane, max(3.0, lane - 1)) for span in row]
    parts += [_piece(span, until, height - 7, 6, "passing") for span in passing]
    return tag("div", tag("div", role, class_="role"), tag("svg", *parts, width="100%", height=height, role="img"),
               class_="lane")  # fmt: skip


def _piece(span: Span, until: Scale, y: float, height: float, class_: str = "work") -> Markup:
    begin, end = until(max(0.0, span.begin_s)), until(min(span.end_s, until.high))
    words = f"{span.role}: {span.kind} of version {span.version}, {seconds(span.end_s - span.begin_s)} from "
    words += seconds(span.begin_s)
    return tag("rect", tag("title", words), x=percent(begin), y=y, width=percent(max(end - begin, 0.001)),
               height=height, rx=1.5, fill=colour(_version(span.version)), class_=class_)  # fmt: skip


def _axis(until: Scale) -> Markup:
    parts = []
    for tick in until.ticks(5):
        place = until(tick)
        anchor = "start" if place < 0.05 else "end" if place > 0.95 else "middle"
        parts.append(tag("line", x1=percent(place), x2=percent(place), y1=0, y2=4, class_="axis"))
        parts.append(tag("text", short(seconds(tick)), x=percent(place), y=16, text_anchor=anchor, class_="tick"))
    axis = tag("svg", *parts, width="100%", height=_BELOW, aria_hidden="true")
    return tag("div", tag("div", class_="role"), axis, class_="lane")


def _version(version: int) -> str:
    return f"v{version % NUM_VERSION_COLOURS}"
