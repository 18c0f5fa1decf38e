"""Numbers as people read them: three digits, a unit, a spread in brackets."""

from math import floor, log10

from rl.bench.metric import Unit
from rl.bench.results import CellKey
from rl.bench.spread import Spread

NOT_MEASURED = "-"
_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def digits(value: float, count: int = 3) -> str:
    """`0.612`, `12.3`, `1,234`: at least `count` digits that count, no exponent between 0.0001 and a billion."""
    if value == 0 or not abs(value) < float("inf"):
        return f"{value:g}"
    # Rounded first, since 0.9996 is 1.00.
    places = count - 1 - floor(log10(abs(float(f"{value:.{count - 1}e}"))))
    if not -7 < places <= count + 3:
        return f"{value:.{count - 1}e}"
    return f"{value:,.{max(0, places)}f}"


def seconds(value: float) -> str:
    """`1.23 s`, `45.6 ms`, `7.89 µs`."""
    if value == 0:
        return "0 s"
    factor, unit = next((pair for pair in _SECONDS if abs(value) >= pair[0] * 0.9995), _SECONDS[-1])
    return f"{digits(value / factor)} {unit}"


def size(value: float) -> str:
    """`1.25 GB`, `64 MB`, in powers of ten."""
    factor, unit = next((pair for pair in _BYTES if abs(value) >= pair[0] * 0.9995), _BYTES[-1])
    return f"{digits(value / factor) if value % factor else int(value / factor)} {unit}"


def share(value: float) -> str:
    """`4.2 %`."""
    percent = value * 100
    return f"{percent:.0f} %" if abs(percent) >= 9.95 or percent == 0 else f"{digits(percent, 2)} %"


def number(value: float, unit: Unit) -> str:
    """With its unit, as short as can be."""
    if unit == "s":
        return seconds(value)
    if unit == "share":
        return share(value)
    if unit in ("bytes", "bytes/s"):
        return size(value) + unit.removeprefix("bytes")
    return plain(value) if unit == "versions" else digits(value)


def plain(value: float) -> str:
    """Two digits that count, no zeros behind them: `0`, `4`, `1.1`."""
    return f"{value:.2g}" if abs(value) < 100 else f"{value:,.0f}"


def times(value: float) -> str:
    """A ratio: `1.42x`."""
    return f"{value:.2f}x" if value < 10 else f"{digits(value)}x"


def with_spread(value: Spread | None, unit: Unit = "") -> str:
    """`612 ms (598 ms-640 ms)`; without brackets where one run says nothing about the spread."""
    if value is None:
        return NOT_MEASURED
    middle, low, high = (number(one, unit) for one in (value.median, value.low, value.high))
    return middle if value.n == 1 or low == high else f"{middle} ({between(low, high)})"


def times_with_spread(value: Spread | None) -> str:
    """`1.42x (1.38-1.45)`."""
    if value is None:
        return NOT_MEASURED
    low, high = times(value.low).removesuffix("x"), times(value.high).removesuffix("x")
    return times(value.median) if value.n == 1 else f"{times(value.median)} ({low}-{high})"


def between(low: str, high: str) -> str:
    """`598-640 ms`: the unit once, where both have the same."""
    low_unit, high_unit = low.partition(" ")[2], high.partition(" ")[2]
    return f"{low.partition(' ')[0]}-{high}" if low_unit == high_unit else f"{low}-{high}"


def mode_name(key: CellKey) -> str:
    """The mode, with the bound of its staleness where it has one."""
    return f"{key.mode} ≤{key.max_staleness}" if key.mode == "async" and key.max_staleness else key.mode


def unusual(key: CellKey) -> str:
    """What is not usual about a cell, to be put behind a name; an emulated engine is, where all is emulated."""
    words = key.label.removeprefix(f"{key.stack} {key.mode}")
    return words.replace(" emulated", "", 1) if key.placement == key.engine == "emulated" else words


def cell_name(key: CellKey) -> str:
    """`ray async ≤2`, with everything that is not usual behind it; different for different cells."""
    name = f"{key.stack} {mode_name(key)}{unusual(key)}"
    return name if key.placement == "pinned" else f"{name} ({key.placement})"
