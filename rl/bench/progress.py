"""What a benchmark says while it goes on."""

from collections.abc import Callable

from rl.types import Frozen


class Progress(Frozen):
    """A measurement begins, or is over."""

    done: int
    """Measurements that are over, failed ones included."""
    total: int
    text: str
    """What is measured now; where it is over, what was found."""
    found: bool = False
    """Whether it is over."""
    failed: bool = False


Report = Callable[[Progress], None]
