"""Medians with their spread, and ratios of cells."""

import statistics

from hypothesis import given
from hypothesis import strategies as st

from rl.bench.numbers import digits, number, seconds, share, size, with_spread
from rl.bench.results import CellKey, CellRun, Mode
from rl.bench.spread import Spread, by_cell, order_of, percentile, speed_ups, spread_of

positive = st.floats(min_value=1e-3, max_value=1e3)


def run(mode: Mode, duration_s: float, seed: int = 0, *, stack: str = "ray", trajectories: int = 640,
        repeat: int = 0, error: str = "", staleness: int = 0) -> CellRun:  # fmt: skip
    key = CellKey(stack=stack, mode=mode, max_staleness=staleness)
    return CellRun(key=key, seed=seed, repeat=repeat, order=0, load_before=0.0, error=error, num_updates=20,
                   duration_s=duration_s, trajectories=trajectories)  # fmt: skip


@given(st.lists(positive, min_size=1, max_size=9))
def test_the_median_is_within_its_spread(values: list[float]) -> None:
    spread = spread_of(values)
    assert spread is not None
    assert spread.low <= spread.median <= spread.high
    assert (spread.median, spread.n) == (statistics.median(values), len(values))
    assert not spread.apart(spread)


@given(st.lists(positive, min_size=1, max_size=30), st.floats(0, 1))
def test_percentiles_are_between_their_neighbours(values: list[float], part: float) -> None:
    found = percentile(values, part)
    assert found is not None
    assert min(values) <= found <= max(values) * (1 + 1e-12)
    middle = percentile(values, 0.5)
    assert middle is not None
    assert abs(middle - statistics.median(values)) < 1e-9 * max(values)


def test_what_was_not_measured_has_no_spread() -> None:
    assert spread_of([]) is None
    assert spread_of([None, None]) is None
    assert spread_of([None, 2.0]) == Spread(median=2, low=2, high=2, n=1)
    assert percentile([], 0.5) is None


def test_medians_differ_beyond_both_spreads_or_not_at_all() -> None:
    first = Spread(median=1.0, low=0.98, high=1.03, n=3)
    assert first.apart(Spread(median=1.2, low=1.15, high=1.25, n=3))
    assert not first.apart(Spread(median=1.12, low=1.05, high=1.15, n=3)), "0.12 is less than 0.05 + 0.10"
    alone = Spread(median=1.2, low=1.2, high=1.2, n=1)
    assert not first.apart(alone), "one run says nothing about its spread"
    assert first.apart(alone.model_copy(update={"median": 1.5}))


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=7))
def test_a_speed_up_is_the_ratio_of_medians_within_the_ratios_of_pairs(times: list[tuple[float, float]]) -> None:
    runs = [run("sync", slow, seed) for seed, (slow, _) in enumerate(times)]
    runs += [run("async", fast, seed, staleness=4) for seed, (_, fast) in enumerate(times)]
    cells = by_cell(runs)
    faster = speed_ups(cells, CellKey(stack="ray", mode="async", max_staleness=4))
    assert faster.colocated is None, "that baseline was not measured"
    assert faster.split is not None
    ratios = [slow / fast for slow, fast in times]
    rates = [statistics.median(640 / each for each in side) for side in zip(*times, strict=True)]
    assert abs(faster.split.median - rates[1] / rates[0]) < 1e-9 * faster.split.median
    assert abs(faster.split.low - min(ratios)) < 1e-9 * min(ratios)
    assert faster.split.low <= faster.split.median <= faster.split.high
    assert faster.split.n == len(times)


def test_a_cell_that_trains_on_less_is_not_faster() -> None:
    cells = by_cell([run("sync", 18.0), run("async", 10.0, trajectories=448, staleness=4)])
    faster = speed_ups(cells, CellKey(stack="ray", mode="async", max_staleness=4)).split
    assert faster is not None
    assert round(faster.median, 2) == 1.26, "1.80 by time alone, of 0.7 of the samples"


def test_only_runs_of_the_same_seed_and_repeat_are_paired() -> None:
    runs = [run("sync", 10.0, 0), run("sync", 30.0, 1), run("sync", 20.0, 0, repeat=1)]
    runs += [run("async", 5.0, 0, staleness=4), run("async", 5.0, 2, staleness=4)]
    runs += [run("async", 5.0, 1, staleness=4, error="lost")]
    faster = speed_ups(by_cell(runs), CellKey(stack="ray", mode="async", max_staleness=4)).split
    assert faster == Spread(median=2.0, low=2.0, high=2.0, n=1)


def test_baselines_are_of_the_same_stack() -> None:
    cells = by_cell([run("sync", 10.0, stack="local"), run("sync-colocated", 8.0), run("async", 5.0)])
    faster = speed_ups(cells, CellKey(stack="ray", mode="async"))
    assert faster.split is None
    assert faster.colocated is not None and faster.colocated.median == 1.6
    itself = speed_ups(cells, CellKey(stack="ray", mode="sync-colocated"))
    assert itself.colocated is None and itself.split is None


def test_cells_are_in_the_order_in_which_people_read() -> None:
    keys = [CellKey(stack=stack, mode=mode) for stack in ("trl", "hybrid", "local") for mode in ("async", "sync")]  # type: ignore[arg-type]
    keys.append(CellKey(stack="local", mode="sync", placement="emulated"))
    ordered = [(key.stack, key.mode, key.placement) for key in sorted(keys, key=order_of)]
    assert ordered[:2] == [("local", "sync", "pinned"), ("local", "async", "pinned")]
    assert ordered[-3:] == [("trl", "sync", "pinned"), ("trl", "async", "pinned"), ("local", "sync", "emulated")]


@given(st.floats(min_value=1e-6, max_value=1e8))
def test_numbers_have_three_digits(value: float) -> None:
    text = digits(value)
    assert abs(float(text.replace(",", "")) - value) <= 0.0051 * value, text


def test_numbers_as_people_read_them() -> None:
    assert [seconds(value) for value in (0, 4.2e-6, 0.01234, 0.99999, 75)] == [
        "0 s",
        "4.20 µs",
        "12.3 ms",
        "1.00 s",
        "75.0 s",
    ]
    assert [size(value) for value in (0, 999, 1_000_000, 1_234_432)] == ["0 B", "999 B", "1 MB", "1.23 MB"]
    assert [share(value) for value in (0, 0.0012, 0.031, 0.5)] == ["0 %", "0.12 %", "3.1 %", "50 %"]
    assert number(2.5e9, "bytes/s") == "2.50 GB/s"
    assert with_spread(Spread(median=0.612, low=0.598, high=0.64, n=3), "s") == "612 ms (598-640 ms)"
    assert with_spread(Spread(median=1.0, low=0.9, high=1.1, n=3), "s") == "1.00 s (900 ms-1.10 s)"
    assert with_spread(Spread(median=1.0, low=1.0, high=1.0, n=1), "s") == "1.00 s"
    assert with_spread(None) == "-"
