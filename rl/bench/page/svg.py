"""Horizontal bars, one a row, between a name and a number; with spread, and the bound that a number is held against."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil, floor, isclose, log10

from markupsafe import Markup, escape

_ZEROS = re.compile(r"\.0+(?!\d)|(?<=\.\d)0+(?!\d)")

Format = Callable[[float], str]


def tag(name: str, *children: str | Markup, **attributes: object) -> Markup:
    """`tag("rect", tag("title", "a"), x="1%", class_="b")`; what is None is left out, `_` is `-` in a name."""
    given = [
        f' {key.rstrip("_").replace("_", "-") if key != "viewBox" else key}="{escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    ]
    inner = "".join(escape(child) for child in children)
    # Everything in it is escaped.
    return Markup(f"<{name}{''.join(given)}>{inner}</{name}>")


def joined(parts: Iterable[Markup]) -> Markup:
    """One after the other."""
    return Markup("").join(parts)


def short(words: str) -> str:
    """`20.0 s` as `20 s`: for ticks, which are round."""
    return _ZEROS.sub("", words)


def percent(share: float) -> str:
    """A place along x."""
    return f"{share * 100:.2f}%"


def colour(name: str) -> str:
    """A colour of the page, as it is in this scheme."""
    return f"var(--{name})"


@dataclass(frozen=True)
class Scale:
    """From `low` and `high` to 0 and 1."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where a value is; what is outside is at the edge."""
        low, high, value = (self._line(one) for one in (self.low, self.high, max(value, self.low)))
        return 0.5 if high <= low else min(1.0, max(0.0, (value - low) / (high - low)))

    def ticks(self, about: int = 4) -> list[float]:
        """Round values from low to high."""
        if self.log:
            first, last = ceil(log10(self.low) - 1e-9), floor(log10(self.high) + 1e-9)
            step = max(1, ceil((last - first) / (about + 1)))
            return [10.0**power for power in range(first, last + 1, step)]
        if self.high <= self.low:
            return [self.low]
        width = _round_step((self.high - self.low) / about)
        first = ceil(self.low / width - 1e-9)
        return [number * width for number in range(first, floor(self.high / width + 1e-9) + 1)]

    def rounded(self) -> "Scale":
        """Up to the next tick, so that the highest value is below a line."""
        if self.log or self.high <= self.low:
            return self
        step = _round_step((self.high - self.low) / 4)
        return Scale(self.low, ceil(self.high / step - 1e-9) * step)

    def _line(self, value: float) -> float:
        return log10(value) if self.log else value


def scale(values: Iterable[float], *, zero: bool = False, log: bool = False, room: float = 0.0) -> Scale:
    """Around all values: with `zero` from zero, with `room` so much more above, on a log scale by whole decades."""
    known = list(values)
    if log:
        known = [value for value in known if value > 0] or [1.0]
        return Scale(10.0 ** floor(log10(min(known)) + 1e-9), 10.0 ** ceil(log10(max(known)) - 1e-9), log=True)
    known = known or [0.0]
    low, high = min(known), max(known)
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    if isclose(low, high):
        high = low + (abs(low) or 1.0)
    return Scale(low, high + (high - low) * room)


def _round_step(least: float) -> float:
    power = 10.0 ** floor(log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * 0.999)


def _text(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
