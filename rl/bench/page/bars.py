"""Horizontal bars, one a row, between a name and a number; with spread, and the bound that a number is held against."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from rl.bench.page.svg import Scale, colour, joined, percent, tag
from rl.bench.spread import Spread

_HEIGHT = 22


@dataclass(frozen=True)
class Bar:
    """One row."""

    label: str
    number: str
    colour: str
    parts: Sequence[tuple[float, str, str]]
    """Length, name of the colour and words of each piece, from the left."""
    spread: Spread | None = None
    bound: float | None = None
    heading: str = ""
    """Over this row, where it begins a group."""


def bar_chart(bars: Sequence[Bar], lengths: Scale) -> Markup:
    """All rows by the same scale, whose zero is at the left."""
    return tag("div", joined(_row(bar, lengths) for bar in bars), class_="bars")


def _row(bar: Bar, lengths: Scale) -> Markup:
    parts, begin = [tag("rect", x=0, y=3, width="100%", height=_HEIGHT - 6, rx=3, class_="track")], 0.0
    for length, name, words in bar.parts:
        width = lengths(begin + length) - lengths(begin)
        parts.append(tag("rect", tag("title", words), x=percent(lengths(begin)), y=3, width=percent(width),
                         height=_HEIGHT - 6, rx=2, fill=colour(name)))  # fmt: skip
        begin += length
    if bar.spread is not None and bar.spread.high > bar.spread.low:
        ends = [percent(lengths(end)) for end in (bar.spread.low, bar.spread.high)]
        parts.append(tag("line", x1=ends[0], x2=ends[1], y1=_HEIGHT / 2, y2=_HEIGHT / 2, class_="range"))
        parts += [tag("line", x1=end, x2=end, y1=_HEIGHT / 2 - 4, y2=_HEIGHT / 2 + 4, class_="range") for end in ends]
    if bar.bound is not None:
        at = percent(lengths(bar.bound))
        parts.append(tag("line", x1=at, x2=at, y1=0, y2=_HEIGHT, class_="bound"))
    heading = tag("div", bar.heading, class_="bar-heading") if bar.heading else Markup("")
    drawing = tag("svg", tag("title", f"{bar.label}: {bar.number}"), *parts, width="100%", height=_HEIGHT, role="img")
    label, number = tag("div", bar.label, class_="bar-label"), tag("div", bar.number, class_="bar-number")
    return heading + tag("div", label, drawing, number, class_="bar")


@dataclass(frozen=True)
class Range:
    """A median with its lowest and highest, as a dot on a line."""

    label: str
    number: str
    colour: str
    spread: Spread
    heading: str = ""


def range_chart(rows: Sequence[Range], places: Scale, mark: float) -> Markup:
    """Dots by one scale, with a line at `mark`, e.g. where two are equal."""
    return tag("div", joined(_dot(row, places, mark) for row in rows), class_="bars")


def _dot(row: Range, places: Scale, mark: float) -> Markup:
    low, middle, high = (percent(places(one)) for one in (row.spread.low, row.spread.median, row.spread.high))
    at = percent(places(mark))
    parts = [
        tag("rect", x=0, y=3, width="100%", height=_HEIGHT - 6, rx=3, class_="track"),
        tag("line", x1=at, x2=at, y1=0, y2=_HEIGHT, class_="bound"),
        tag("line", x1=low, x2=high, y1=_HEIGHT / 2, y2=_HEIGHT / 2, stroke=colour(row.colour), class_="whisker"),
        tag("circle", tag("title", f"{row.label}: {row.number}"), cx=middle, cy=_HEIGHT / 2, r=5,
            fill=colour(row.colour)),
    ]  # fmt: skip
    heading = tag("div", row.heading, class_="bar-heading") if row.heading else Markup("")
    drawing = tag("svg", *parts, width="100%", height=_HEIGHT, role="img")
    label, number = tag("div", row.label, class_="bar-label"), tag("div", row.number, class_="bar-number")
    return heading + tag("div", label, drawing, number, class_="bar")
