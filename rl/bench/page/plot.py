"""Lines over two scales, with a band or whiskers for the spread.

Curves are drawn in a picture of their own that is stretched to the width; text and marks are not stretched.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from rl.bench.page.svg import Format, Scale, colour, joined, percent, short, tag
from rl.bench.spread import Spread

HEIGHT = 220
_ABOVE, _BELOW, _WIDE = 16, 36, 1000


@dataclass(frozen=True)
class Line:
    """One curve: x, and median, low and high at it."""

    label: str
    colour: str
    points: Sequence[tuple[float, Spread]]
    dashed: bool = False
    marks: bool = True
    """Points with whiskers; without, a curve with a band."""


def plot(
    lines: Sequence[Line],
    x: Scale,
    y: Scale,
    *,
    x_title: str,
    x_format: Format,
    y_format: Format,
    x_ticks: Sequence[float] | None = None,
    height: int = HEIGHT,
) -> Markup:
    """The lines over a grid. What a point is is said where it is pointed at. `x_ticks` instead of round numbers."""
    curves = joined(part for line in lines for part in _curve(line, x, y, height))
    return tag(
        "svg",
        tag("title", f"{', '.join(dict.fromkeys(line.label for line in lines))}, by {x_title}"),
        joined(tag("line", x1=0, x2="100%", y1=at, y2=at, class_="grid") for at, _ in _levels(y, y_format, height)),
        _below(x, x.ticks() if x_ticks is None else x_ticks, x_format, x_title, height),
        tag("svg", curves, viewBox=f"0 0 {_WIDE} {height}", preserveAspectRatio="none", x=0, y=_ABOVE, width="100%",
            height=height, class_="curves"),
        joined(part for line in lines if line.marks for part in _marks(line, x, y, height, x_format, y_format)),
        # Over the curves, which may begin where the words are.
        joined(tag("text", words, x=0, y=at - 3, class_="tick") for at, words in _levels(y, y_format, height)),
        class_="plot", width="100%", height=_ABOVE + height + _BELOW, role="img",
    )  # fmt: skip


def _levels(y: Scale, y_format: Format, height: int) -> list[tuple[float, str]]:
    return [(_ABOVE + height * (1 - y(tick)), short(y_format(tick))) for tick in y.ticks()]


def _below(x: Scale, ticks: Sequence[float], x_format: Format, x_title: str, height: int) -> Markup:
    parts = []
    for tick in ticks:
        place = x(tick)
        anchor = "start" if place < 0.05 else "end" if place > 0.95 else "middle"
        at = _ABOVE + height
        parts.append(tag("line", x1=percent(place), x2=percent(place), y1=at, y2=at + 4, class_="axis"))
        parts.append(tag("text", short(x_format(tick)), x=percent(place), y=at + 16, text_anchor=anchor, class_="tick"))
    parts.append(tag("text", x_title, x="100%", y=_ABOVE + height + 32, text_anchor="end", class_="axis-title"))
    return joined(parts)


def _curve(line: Line, x: Scale, y: Scale, height: int) -> list[Markup]:
    def place(at: float, value: float) -> str:
        return f"{x(at) * _WIDE:.1f},{height * (1 - y(value)):.1f}"

    parts = []
    if not line.marks and any(spread.high > spread.low for _, spread in line.points):
        above = [place(at, spread.high) for at, spread in line.points]
        below = [place(at, spread.low) for at, spread in reversed(line.points)]
        parts.append(tag("polygon", points=" ".join(above + below), fill=colour(line.colour), class_="band"))
    middle = " ".join(place(at, spread.median) for at, spread in line.points)
    parts.append(
        tag("polyline", points=middle, stroke=colour(line.colour), class_="dashed" if line.dashed else "solid")
    )
    return parts


def _marks(line: Line, x: Scale, y: Scale, height: int, x_format: Format, y_format: Format) -> list[Markup]:
    parts = []
    for at, spread in line.points:
        across = percent(x(at))
        low, middle, high = (_ABOVE + height * (1 - y(one)) for one in (spread.low, spread.median, spread.high))
        said = f"{line.label}, {x_format(at)}: {y_format(spread.median)}"
        said += f" ({y_format(spread.low)} to {y_format(spread.high)}, {spread.n} runs)" if spread.n > 1 else ""
        if low - high > 1:
            parts.append(
                tag("line", x1=across, x2=across, y1=low, y2=high, stroke=colour(line.colour), class_="whisker")
            )
        parts.append(tag("circle", tag("title", said), cx=across, cy=middle, r=3.5, fill=colour(line.colour)))
    return parts
