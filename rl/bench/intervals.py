"""Stretches of time, and how they overlap."""

from collections.abc import Iterable

Interval = tuple[float, float]
"""From when to when, in seconds."""


def union(intervals: Iterable[Interval], window: Interval) -> list[Interval]:
    """Their parts within the window, in order, none touching another."""
    low, high = window
    merged: list[Interval] = []
    for begin, end in sorted((max(begin, low), min(end, high)) for begin, end in intervals):
        if end <= begin:
            continue
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def length_s(intervals: Iterable[Interval], window: Interval) -> float:
    """How long at least one of them goes on within the window."""
    return sum(end - begin for begin, end in union(intervals, window))
