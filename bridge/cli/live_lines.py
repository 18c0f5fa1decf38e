"""A view that is redrawn at the foot of the terminal, and lines above it that stay. Nothing is drawn before `draw`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

DRAWINGS_PER_S = 4


class LiveLines:
    """One stream. Where nothing is drawn, lines are printed as they are."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live: Live | None = None

    def draw(self, picture: "Callable[[Console], RenderableType]") -> None:
        """Begin to redraw, from the first call on."""
        if self._live is not None:
            return
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self._stream, markup=False, highlight=False)
        self._live = Live(
            console=console,
            get_renderable=lambda: picture(console),
            refresh_per_second=DRAWINGS_PER_S,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def refresh(self) -> None:
        """Draw now."""
        if self._live is not None:
            self._live.refresh()

    def note(self, text: str) -> None:
        """A line that stays."""
        if self._live is None:
            print(text, file=self._stream, flush=True)
            return
        from rich.text import Text

        self._live.console.print(Text(text))

    def close(self) -> None:
        """Erase the picture; what is printed next takes its place."""
        if self._live is not None:
            self._live.stop()
            self._live = None
