"""What a benchmark shows while it goes on: a line per measurement, and on a terminal what is measured now."""

import os
import time
from typing import TYPE_CHECKING, TextIO

from bridge.cli.live_lines import LiveLines
from bridge.terminal import clock, cut, duration, terminal_width, visible
from rl.bench.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

BAR_CELLS = 30


class BenchView(LiveLines):
    """Lines that stay, and below them, where the stream is a terminal, one that is redrawn in place."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._can_draw = terminal_width(stream) is not None and os.environ.get("TERM") != "dumb"
        self._now: Progress | None = None
        self._began = self._since = time.monotonic()

    def add(self, progress: Progress) -> None:
        """Show what was found, or what comes next."""
        if progress.found:
            sign = "failed  " if progress.failed else ""
            self.note(f"{clock()} [{progress.done}/{progress.total}] {sign}{visible(progress.text)}")
        else:
            self._now, self._since = progress, time.monotonic()
            if self._can_draw:
                self.draw(self._drawn)

    def picture(self) -> str:
        """The line that is redrawn."""
        if self._now is None:
            return ""
        now, seconds = self._now, time.monotonic()
        full = round(BAR_CELLS * now.done / max(1, now.total))
        left = ""
        if now.done:
            left = f"  {duration((self._since - self._began) / now.done * (now.total - now.done))} left"
        bar = f"{'━' * full}{'╌' * (BAR_CELLS - full)} {now.done}/{now.total}{left}"
        return f"{bar}  {visible(now.text)}  {duration(seconds - self._since)}"

    def _drawn(self, console: "Console") -> "RenderableType":
        from rich.text import Text

        return Text(cut(self.picture(), terminal_width(self._stream) or 80), no_wrap=True)
