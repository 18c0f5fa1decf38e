"""A sentence that the numbers allow, and how several spreads are ranked."""

from collections.abc import Iterable

from rl.bench.numbers import with_spread
from rl.bench.spread import Spread
from rl.types import Frozen

ONE = Spread(median=1.0, low=1.0, high=1.0, n=2)
"""What a ratio is held against."""


class Finding(Frozen):
    """Something that the numbers allow to be said."""

    about: str
    text: str


def ranked(values: dict[str, Spread]) -> tuple[str, list[str], list[str]]:
    """The lowest, those that are not apart from it, and those that are."""
    first, *others = sorted(values, key=lambda name: values[name].median)
    apart = [name for name in others if values[name].apart(values[first])]
    return first, [name for name in others if name not in apart], apart


def listed(values: dict[str, Spread], names: Iterable[str], unit: str = "s") -> str:
    return ", ".join(f"{name} {with_spread(values[name], 's' if unit == 's' else 'bytes')}" for name in names)
