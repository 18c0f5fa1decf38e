"""The work of `matrix.yaml` and `cache.yaml`: dice that can be thrown again with the same result."""

import random
from statistics import fmean
from typing import Any


def roll(seed: int, sides: int, times: int) -> dict[str, Any]:
    """The mean of `times` throws of one die."""
    die = random.Random(seed)
    return {"mean": fmean(die.randint(1, sides) for _ in range(times)), "sides": sides}


def compare(means: list[float], sides: list[int]) -> dict[str, Any]:
    """How far each mean is from that of a fair die, as a share of it."""
    fair = [(count + 1) / 2 for count in sides]
    return {"bias": [round(mean / expected - 1, 4) for mean, expected in zip(means, fair, strict=True)]}
