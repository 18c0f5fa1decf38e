"""What a training run shows while it goes on: a line per update, or a view that is redrawn in place on a terminal.

    RunEvent -> Training (what is known) -> PlainTraining | LiveTraining

rich is imported when there is something to draw.
"""

import os
import time
from typing import TYPE_CHECKING, Protocol, TextIO

from bridge.cli.live_lines import LiveLines
from bridge.terminal import clock, cut, duration, terminal_width, visible
from rl.config import RunConfig
from rl.event_line import event_line, idle_words, speed_words, staleness_words
from rl.metrics import EvaluationRecord, Notice, RunEvent, UpdateRecord

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

BAR_CELLS = 30
SPARK_CELLS = 60
_SPARKS = "▁▂▃▄▅▆▇█"
_LAST_NOTICES = 3
_QUIET_NOTICES = ("checkpoint",)


class Training:
    """What is known of a run from its events so far."""

    def __init__(self, config: RunConfig, folder: str) -> None:
        self.config = config
        self.folder = folder
        self.rewards: list[float] = []
        """[updates seen here]"""
        self.update: UpdateRecord | None = None
        self.evaluations: list[EvaluationRecord] = []
        self.notices: list[Notice] = []
        self.began = time.monotonic()
        self._first = 0

    def add(self, event: RunEvent) -> None:
        """Take an event in."""
        if isinstance(event, UpdateRecord):
            if self.update is None:
                self._first = event.train.update
            self.update = event
            self.rewards.append(event.train.mean_reward)
        elif isinstance(event, EvaluationRecord):
            self.evaluations.append(event)
        elif event.event not in _QUIET_NOTICES:
            self.notices.append(event)

    @property
    def num_done(self) -> int:
        """Updates that are done, those of an earlier part of the run included."""
        return 0 if self.update is None else self.update.train.update + 1

    @property
    def left_s(self) -> float | None:
        """Seconds to the last update at the pace so far, None before there is one."""
        done = self.num_done - self._first
        if self.update is None or done < 1:
            return None
        return (time.monotonic() - self.began) / done * (self.config.updates - self.num_done)


class TrainingView(Protocol):
    """Shows a run while it goes on."""

    def add(self, event: RunEvent) -> None:
        """Show what happened."""

    def note(self, text: str) -> None:
        """Say something about the command itself."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class PlainTraining:
    """A line for every event."""

    def __init__(self, training: Training, stream: TextIO) -> None:
        self._training = training
        self._stream = stream

    def add(self, event: RunEvent) -> None:
        """One line."""
        self._training.add(event)
        if not isinstance(event, Notice) or event.event not in _QUIET_NOTICES:
            self.note(visible(event_line(event, self._training.config.updates)))

    def note(self, text: str) -> None:
        """A line with the time."""
        print(f"{clock()} {text}", file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing to leave behind."""


class LiveTraining(LiveLines):
    """A few lines that are redrawn in place; evaluations and losses of parts stay above them."""

    def __init__(self, training: Training, stream: TextIO) -> None:
        super().__init__(stream)
        self._training = training

    def add(self, event: RunEvent) -> None:
        """Draw anew."""
        self._training.add(event)
        self.draw(self._drawn)
        if isinstance(event, EvaluationRecord) or (isinstance(event, Notice) and event.event not in _QUIET_NOTICES):
            self.note(f"{clock()} {visible(event_line(event, self._training.config.updates))}")
        self.refresh()

    def _drawn(self, console: "Console") -> "RenderableType":
        from rich.console import ConsoleDimensions
        from rich.text import Text

        cells, lines = os.get_terminal_size(self._stream.fileno())
        console.size = size = ConsoleDimensions(cells or 80, lines or 24)
        shown = [cut(text, size.width) for text in picture(self._training)]
        return Text("\n".join(shown), no_wrap=True)


def view_of(training: Training, stream: TextIO) -> TrainingView:
    """The view that suits a stream."""
    can_draw = terminal_width(stream) is not None and os.environ.get("TERM") != "dumb"
    return LiveTraining(training, stream) if can_draw else PlainTraining(training, stream)


def picture(training: Training) -> list[str]:
    """The lines of the live view."""
    config, update = training.config, training.update
    tasks = ", ".join(task.label for task in config.tasks)
    elapsed = duration(time.monotonic() - training.began)
    head = f"{visible(config.model)} on {tasks}, stack {config.stack}  {elapsed}"
    if update is None:
        return [head, "waiting for the first update"]
    done, left_s = training.num_done, training.left_s
    full = round(BAR_CELLS * done / config.updates)
    left = "" if left_s is None else f"  {duration(left_s)} left"
    train, tokens = update.train, update.tokens
    rows = [
        ("updates", f"{'━' * full}{'╌' * (BAR_CELLS - full)} {done}/{config.updates}{left}"),
        ("reward", f"{train.mean_reward:.3f}  correct {train.correct_rate:.0%}  format {train.format_rate:.0%}"),
        ("", sparks(training.rewards, SPARK_CELLS)),
        ("staleness", f"{staleness_words(update).removeprefix('staleness ')}  at most {config.max_staleness} allowed"),
        ("speed", f"{speed_words(update)}  {tokens.wasted / max(1, tokens.generated):.0%} wasted"),
        ("idle", idle_words(update).removeprefix("idle ")),
        ("learner", f"loss {train.loss:.4f}  gradient {train.gradient_norm:.3f}  entropy {train.entropy:.3f}  "
                    f"ESS {train.effective_sample_size:.2f}"),
    ]  # fmt: skip
    if training.evaluations:
        rows.append(("held out", event_line(training.evaluations[-1], config.updates).removeprefix("held-out ")))
    rows += [("", visible(event_line(notice, config.updates))) for notice in training.notices[-_LAST_NOTICES:]]
    return [head, *(f"  {name:<10}{text}" for name, text in rows)]


def sparks(numbers: list[float], cells: int) -> str:
    """Numbers as a row of bars, the newest at the end; means of neighbours where there are more than `cells`."""
    size = -(-len(numbers) // cells) if numbers else 1
    parts = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means, default=0.0), max(means, default=0.0)
    span = high - low
    return "".join(_SPARKS[round((mean - low) / span * (len(_SPARKS) - 1)) if span > 0 else 0] for mean in means)
