"""Text for people: made harmless, in columns, with times. Light: the CLI's quick path imports it."""

import os
import re
import sys
import time
from collections.abc import Sequence
from typing import TextIO

_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"  # OSC, DCS and other strings
    r"|\x1b[ -/]*[0-~]"
)
_HARMFUL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_C1 = re.compile("[\x7f-\x9f]")

COLOURS = {
    "succeeded": "green",
    "failed": "red",
    "timed_out": "red",
    "cancelled": "yellow",
    "running": "cyan",
    "skipped": "bright_black",
    "not_run": "bright_black",
    "waiting": "bright_black",
}
"""Colour of each state and outcome."""


def visible(text: object) -> str:
    """One line that cannot steer a terminal: control sequences are dropped, other control characters are spelt out."""
    plain = _SEQUENCE.sub("", str(text)).expandtabs()
    return _HARMFUL.sub(
        lambda match: f"\\x{ord(match[0]):02x}" if ord(match[0]) < 256 else f"\\u{ord(match[0]):04x}", plain
    )


def _spelt(code: int) -> str:
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def safe_json(text: str) -> str:
    """JSON whose strings hold no raw control character, so that it can be shown on a terminal."""
    return _C1.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def duration(seconds: float) -> str:
    """`0.04s`, `12.3s`, `4m05s`, `2h03m`."""
    seconds = max(0.0, seconds)
    if seconds < 9.995:
        return f"{seconds:.2f}s"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def clock(unix_s: float | None = None) -> str:
    """Local time of day, `HH:MM:SS`."""
    return time.strftime("%H:%M:%S", time.localtime(unix_s))


def moment(unix_s: float) -> str:
    """Local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))


def width_of(text: str) -> int:
    """Terminal cells that a text takes."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def cut(text: str, limit: int) -> str:
    """The text, or its beginning with an ellipsis, in at most `limit` cells."""
    if width_of(text) <= limit:
        return text
    kept = ""
    for letter in text:
        if width_of(kept) + width_of(letter) >= limit:
            break
        kept += letter
    return kept + "…" if limit > 0 else ""


def terminal_width(stream: TextIO) -> int | None:
    """Columns of the terminal behind `stream`; None where there is no terminal and nothing needs to be cut."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80 if stream.isatty() else None
    except (OSError, ValueError):
        return None


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO | None = None) -> list[str]:
    """Lines of a table: columns padded, words of state coloured and lines cut when `stream` is a terminal."""
    limit = terminal_width(stream or sys.stdout)
    table = [list(header), *[[visible(cell) for cell in row] for row in rows]]
    # A single overlong cell must not push the other columns off the screen.
    widest = max(12, limit // 2) if limit else None
    if widest:
        table = [[*[cut(cell, widest) for cell in row[:-1]], row[-1]] for row in table]
    widths = [max(width_of(row[i]) for row in table) for i in range(len(header) - 1)]
    lines = []
    for number, row in enumerate(table):
        room = limit
        parts = []
        for i, cell in enumerate(row):
            last = i == len(row) - 1
            text = cell if room is None else cut(cell, max(0, room))
            room = room if room is None or last else room - widths[i] - 2
            padding = "" if last else " " * (widths[i] - width_of(cell))
            parts.append((heading(text, limit) if number == 0 else coloured(text, text, limit)) + padding)
        lines.append("  ".join(parts).rstrip())
    return lines


def coloured(text: str, state: str, limit: int | None) -> str:
    """`text` in the colour of `state`, or as it is where there is no terminal (`limit` is None)."""
    if limit is None or state not in COLOURS or os.environ.get("NO_COLOR"):
        return text
    import click

    return click.style(text, fg=COLOURS[state])


def heading(text: str, limit: int | None) -> str:
    """`text` in bold on a terminal."""
    if limit is None or not text or os.environ.get("NO_COLOR"):
        return text
    import click

    return click.style(text, bold=True)
