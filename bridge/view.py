"""What a watcher of a run shows while it goes on: plain lines, or a live view of the steps on a terminal.

    RunProgress (what changed) -> Watched (what is known) -> PlainView | LiveView

Plain dictionaries, as the gateway sends them: the quick path needs no pydantic. The live view imports rich when it has
something to draw, while the run is already going on.
"""

import os
import time
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from bridge.terminal import COLOURS, clock, cut, duration, terminal_width, visible, width_of

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.table import Table

UNFINISHED = ("waiting", "running")
FAILURES = ("failed", "timed_out")
ORDER = ("running", "waiting", "succeeded", "failed", "timed_out", "skipped", "cancelled", "not_run")
"""The order of counts."""
MOST_LINES = 200
"""A plan with more steps is shown in plain lines by its failures, retries and counts."""
COUNTS_INTERVAL_S = 5.0
SMALL_PLAN = 30
"""A plan with more steps is shown live by its running and failed ones."""
DRAWN_AFTER_S = 0.2
"""A run that ends before is not worth a live view."""
DRAWINGS_PER_S = 4
BAR_CELLS = 12
LONGEST_VALUE = 24
"""Of a longer matrix value the end is shown."""

Step = dict[str, Any]
"""A `StepState` as JSON data."""


class Watched:
    """What is known of a run, from every progress seen so far."""

    def __init__(self) -> None:
        self.run: dict[str, Any] = {}
        """The last `RunProgress`, without its steps."""
        self.steps: dict[str, Step] = {}
        """By id, in the order they were first seen."""

    @property
    def sequence(self) -> int:
        """How far it is known; 0 at first."""
        return int(self.run.get("sequence", 0))

    @property
    def ended(self) -> bool:
        """True once the run has an outcome."""
        return self.run.get("state", "waiting") not in UNFINISHED

    def update(self, progress: dict[str, Any]) -> list[tuple[Step | None, Step]]:
        """Take what changed in; each changed step as it was and as it is."""
        self.run = {key: value for key, value in progress.items() if key != "steps"}
        changes = [(self.steps.get(step["id"]), step) for step in progress["steps"]]
        self.steps.update((step["id"], step) for step in progress["steps"])
        return changes

    def counts(self) -> str:
        """`1 running, 2 waiting, 3 succeeded`."""
        return counts_text(self.run.get("counts", {}))


class View(Protocol):
    """Shows a run while it goes on."""

    def update(self, watched: Watched, changes: list[tuple[Step | None, Step]]) -> None:
        """Called after each progress, changed or not, several times a second."""

    def note(self, text: str) -> None:
        """Say something about the watching itself."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class QuietView:
    """Shows nothing but notes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def update(self, watched: Watched, changes: list[tuple[Step | None, Step]]) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """A line."""
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing."""


class PlainView:
    """A line for every change: `HH:MM:SS step state ...`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._counted_at = time.monotonic()
        self._counts = ""
        self._waits: set[str] = set()

    def update(self, watched: Watched, changes: list[tuple[Step | None, Step]]) -> None:
        """A line for each step that changed; of a big plan, failures and counts."""
        is_big = watched.run["total"] > MOST_LINES
        for before, step in changes:
            same = before is not None and (before["state"], before["attempt"]) == (step["state"], step["attempt"])
            quiet = is_big and step["state"] not in FAILURES and step["attempt"] < 2
            if not same and not quiet and step["state"] != "waiting":
                self._print(f"{clock()} {label(step)} {_words(step)}")
            self._tell_wait(step)
        if is_big and (watched.ended or time.monotonic() - self._counted_at > COUNTS_INTERVAL_S):
            self._counted_at = time.monotonic()
            if (counts := watched.counts()) != self._counts:
                self._counts = counts
                self._print(f"{clock()} {counts}")

    def _tell_wait(self, step: Step) -> None:
        """What steps wait for before they run anywhere, once for all of them."""
        text = step["progress"].get("text", "")
        if step["state"] != "running" or not text.startswith("waiting for") or step["progress"].get("node"):
            return
        wait = text.partition(" (")[0]
        if wait not in self._waits:
            self._waits.add(wait)
            self._print(f"{clock()} {label(step)} {visible(text)}")

    def note(self, text: str) -> None:
        """A line with the time."""
        self._print(f"{clock()} {text}")

    def close(self) -> None:
        """Nothing to leave behind."""

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class LiveView:
    """A line per step that is redrawn in place; of a big plan the running and failed steps, and counts.

    A thread of rich draws as well, so that times go on while an answer is awaited.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live: Live | None = None
        self._born_at = time.monotonic()

    def update(self, watched: Watched, changes: list[tuple[Step | None, Step]]) -> None:
        """Draw anew."""
        if self._live is None:
            if time.monotonic() - self._born_at < DRAWN_AFTER_S or watched.ended:
                return
            self._live = self._start(watched)
        self._live.refresh()

    def note(self, text: str) -> None:
        """A line above the view; it stays."""
        if self._live is None:
            print(text, file=self._stream, flush=True)
        else:
            from rich.text import Text

            self._live.console.print(Text(text))

    def close(self) -> None:
        """Erase the view; what is printed next takes its place."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _start(self, watched: Watched) -> "Live":
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self._stream, markup=False, highlight=False)
        # Nobody else writes to our streams while we watch, and `print` must stay the terminal's own.
        live = Live(
            console=console,
            get_renderable=lambda: self._drawn(watched, console),
            refresh_per_second=DRAWINGS_PER_S,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        live.start()
        return live

    def _drawn(self, watched: Watched, console: "Console") -> "RenderableType":
        from rich.console import ConsoleDimensions, Group
        from rich.text import Text

        # Rich asks stdin for the size, which need not be the terminal that is drawn on.
        cells, lines = os.get_terminal_size(self._stream.fileno())
        console.size = size = ConsoleDimensions(cells or 80, lines or 24)
        room = max(1, size.height - 3)
        steps = chosen(watched, room)
        hidden = len(watched.steps) - len(steps)
        elapsed = duration(time.time() - watched.run["started_at"])
        title = f"{visible(watched.run['plan'])}  {elapsed}  {watched.counts()}"
        more = f"  ({hidden} not shown)" if hidden else ""
        return Group(Text(cut(title + more, size.width), style="bold", no_wrap=True), self._table(steps, size.width))

    def _table(self, steps: list[Step], width: int) -> "Table":
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1), expand=False)
        name_cells = max((width_of(label(step)) for step in steps), default=0)
        name_cells = min(name_cells, max(8, width // 3))
        fixed = (1, name_cells, 9, 7)
        for cells in (*fixed, max(1, width - sum(fixed) - len(fixed))):
            table.add_column(no_wrap=True, width=cells, overflow="ellipsis")
        for step in steps:
            state = step["state"]
            colour = COLOURS[state]
            table.add_row(
                Text(glyph(state), style=colour),
                Text(label(step)),
                Text(state, style=colour),
                Text(_time(step), justify="right"),
                Text(
                    _doing(step), no_wrap=True, overflow="ellipsis", style="" if state != "running" else "bright_black"
                ),
            )
        return table


def chosen(watched: Watched, room: int) -> list[Step]:
    """The steps to show in `room` lines: all of a small plan, else failures and what runs, the longest first."""
    steps = list(watched.steps.values())
    if len(steps) <= min(room, SMALL_PLAN) and watched.run["total"] <= SMALL_PLAN:
        return steps
    failed = [step for step in steps if step["state"] in FAILURES]
    running = [step for step in steps if step["state"] == "running"]
    ended = [step for step in steps if step["state"] not in (*UNFINISHED, *FAILURES)]
    num_failed = min(len(failed), max(1, room // 3)) if failed else 0
    shown = [*failed[len(failed) - num_failed :], *running[: room - num_failed]]
    is_small = watched.run["total"] <= SMALL_PLAN
    return [*ended[len(ended) - max(0, room - len(shown)) :], *shown] if is_small and room > len(shown) else shown


def view_for(stream: TextIO, quiet: bool) -> View:
    """The view that suits a stream."""
    if quiet:
        return QuietView(stream)
    can_draw = terminal_width(stream) is not None and os.environ.get("TERM") != "dumb"
    return LiveView(stream) if can_draw else PlainView(stream)


def label(step: Step) -> str:
    """Id of a step; of an instance of a matrix step also its values: `count.3 (shard=c)`."""
    _, bracket, values = step["name"].partition(" (")
    if not bracket or not step["id"].rpartition(".")[2].isdigit():
        return visible(step["id"])
    short = ", ".join(_shortened(pair) for pair in visible(values.removesuffix(")")).split(", "))
    return f"{visible(step['id'])} ({short})"


def _shortened(pair: str) -> str:
    """`name=value` with the end of a long value, where paths differ: `shard=…/3.json`."""
    name, equals, value = pair.rpartition("=")
    if len(value) <= LONGEST_VALUE:
        return pair
    end = value[-LONGEST_VALUE + 1 :]
    last_part = end.rfind("/", 0, -1)
    return f"{name}{equals}…{end[max(0, last_part) :]}"


def glyph(state: str) -> str:
    """One cell for a state."""
    return {
        "succeeded": "✓",
        "failed": "✗",
        "timed_out": "✗",
        "running": "▸",
        "cancelled": "■",
        "waiting": "·",
    }.get(state, "-")


def counts_text(counts: dict[str, int]) -> str:
    """Steps by state in words, the states in a fixed order."""
    return ", ".join(f"{counts[state]} {state}" for state in ORDER if counts.get(state))


def bar(fraction: float, cells: int = BAR_CELLS) -> str:
    """A progress bar and its percentage."""
    fraction = min(1.0, max(0.0, fraction))
    done = round(fraction * cells)
    return f"{'━' * done}{'╌' * (cells - done)} {fraction:4.0%}"


def _time(step: Step) -> str:
    if step["state"] == "running":
        return duration(time.time() - step["started_at"]) if step["started_at"] else ""
    return duration(step["duration_s"]) if step["started_at"] else ""


def _doing(step: Step) -> str:
    """What there is to say about a step: where and how far it is, or why it ended so."""
    attempt = f"attempt {step['attempt']}" if step["attempt"] > 1 else ""
    if step["state"] != "running":
        return "  ".join(part for part in (attempt, visible(why(step))) if part)
    progress = step["progress"]
    if step["error"] and not progress.get("last_line"):
        progress = {**progress, "text": f"again after: {why(step)}"}
    fraction = progress.get("fraction")
    parts = [
        attempt,
        f"on {progress['node']}" if progress.get("node") else "",
        bar(fraction) if fraction is not None else "",
        progress.get("text", ""),
        progress.get("last_line", ""),
    ]
    return "  ".join(visible(part).strip() for part in parts if part)


def why(step: Step) -> str:
    """First line of what there is to say about how a step ended."""
    if step["reason"] == "empty_matrix":
        return "its matrix has no values"
    if step["state"] == "succeeded":
        return str(step["reason"])
    first = str(step["error"]).strip().partition("\n")[0]
    return first or str(step["reason"])


def _words(step: Step) -> str:
    """The end of a plain line."""
    state = step["state"]
    attempt = f"attempt {step['attempt']}" if step["attempt"] > 1 else ""
    if state == "running":
        node = step["progress"].get("node", "")
        text = " ".join(part for part in (state, attempt, f"on {visible(node)}" if node else "") if part)
        return f"{text} after: {visible(why(step))}" if step["error"] else text
    time_text = duration(step["duration_s"]) if step["started_at"] else ""
    said = visible(why(step))
    text = " ".join(part for part in (state, time_text, attempt) if part)
    return f"{text}: {said}" if said and said != state else text
