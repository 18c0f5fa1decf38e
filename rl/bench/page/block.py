"""What a section of the page is made of."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from rl.bench.results import CellKey, Mode
from rl.types import Frozen

MODE_COLOURS: dict[Mode, str] = {
    "sync-colocated": "colocated",
    "sync": "sync",
    "one-step": "one-step",
    "async": "async",
}
NUM_COLOURS = 8
"""Of the palette for everything that is no mode: `c0`, ..., where `c0` is grey."""
NUM_VERSION_COLOURS = 6
_MOST_ROWS = 12


@dataclass(frozen=True)
class Legend:
    """One entry: a word and the name of its colour."""

    label: str
    colour: str
    kind: str = "area"
    """`area`, `line`, `dashes`, `bound`."""


@dataclass(frozen=True)
class Figure:
    """A picture with its title, and how to read it."""

    drawing: Markup
    title: str = ""
    legend: Sequence[Legend] = ()
    note: str = ""
    wide: bool = False
    """Over both columns."""


@dataclass(frozen=True)
class Table:
    """Rows of words and numbers; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | Markup]]
    title: str = ""
    note: str = ""
    words: bool = False
    """Whether the cells are words, which are set to the left and wrapped."""
    open: bool = False
    """Shown at once, however many rows there are."""

    @property
    def folded(self) -> bool:
        """Whether it takes a click to be seen."""
        return not self.open and len(self.rows) > _MOST_ROWS


@dataclass(frozen=True)
class Section:
    """A part of the page. Without figures and tables it says what is `missing`."""

    id: str
    title: str
    intro: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    missing: str = "Not measured."

    @property
    def empty(self) -> bool:
        return not self.figures and not self.tables


def tables_by_mode(header: Sequence[str], rows: Sequence[tuple[CellKey, tuple[str, ...]]], note: str) -> list[Table]:
    """One table of the asynchronous cells, and one of the others, which are folded where they are many."""
    first = [row for key, row in rows if key.mode == "async"]
    others = [row for key, row in rows if key.mode != "async"]
    if not first:
        return [Table(header, others, note=note)] if others else []
    tables = [Table(header, first, note=note, open=True)]
    return [*tables, Table(header, others, title="The other modes")] if others else tables


class Tile(Frozen):
    """One number at the top of the page."""

    value: str
    label: str
    detail: str = ""


def mode_colour(key: CellKey) -> str:
    """Name of the colour of a cell's mode, the same all over the page."""
    return MODE_COLOURS[key.mode]


def mode_legend(keys: Sequence[CellKey]) -> list[Legend]:
    """Of the modes that there are."""
    there = {key.mode for key in keys}
    return [Legend(mode, colour) for mode, colour in MODE_COLOURS.items() if mode in there]


def check(good: bool, word: str = "") -> Markup:
    """A mark that needs no colour to be read."""
    sign, kind = ("✓", "good") if good else ("✗", "bad")
    return Markup('<span class="mark {}">{}{}</span>').format(kind, sign, f" {word}" * bool(word))
