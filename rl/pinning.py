"""Which cores a thread computes on: what is measured side by side must not wander.

A thread that is pinned hands its cores on to the threads that it starts, such as those of OpenMP.
"""

import os
from collections.abc import Sequence


def usable_cores() -> list[int]:
    """The cores that this process may use, in ascending order."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def pin(cores: Sequence[int] | None) -> None:
    """Keep the calling thread on these cores; None leaves it as it is. Raises ValueError for cores it cannot have."""
    if cores is None:
        return
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError("`cores` is set, but this system cannot keep a thread on a core\n\nhint: leave `cores` out")
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        raise ValueError(
            f"`cores` is {list(cores)}, this process may use {usable_cores()}: {error.strerror}\n\n"
            "hint: choose some of these, or leave `cores` out"
        ) from error
