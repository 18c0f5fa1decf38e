"""What follows for choosing a stack, in words, from the numbers alone: no claim goes beyond the spread of both sides.

    Results -> headline, findings

Every rule is a function from the results to sentences; where something was not measured, it says nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from rl.bench import metric as metrics
from rl.bench.cautions import cautions
from rl.bench.finding import ONE, Finding, listed, ranked
from rl.bench.findings_parts import peers, recovery, sizes, transports
from rl.bench.metric import Metric
from rl.bench.numbers import digits, seconds, times_with_spread, with_spread
from rl.bench.results import CellKey, CellRun, Results
from rl.bench.spread import (
    MODES,
    Cells,
    Spread,
    by_cell,
    order_of,
    ratio_of,
    speed_ups,
    spread_of,
    usual,
)

LAST_SHARE = 0.2
"""Of the updates, whose mean reward counts as the reward at the end."""


def headline(results: Results) -> str:
    """The benchmark in a sentence or two."""
    cells = main_cells(results)
    asynchronous = [key for key in cells if key.mode == "async" and usual(key)]
    if not asynchronous:
        return "No asynchronous cell with long-tailed lengths was measured."
    best = max(asynchronous, key=lambda key: _median(metrics.SAMPLES, cells[key]))
    faster = speed_ups(cells, best)
    said = [
        _times_as_many(ratio, words)
        for ratio, words in ((faster.split, "in turns on the same cores"), (faster.colocated, "in turns on all cores"))
        if ratio is not None
    ]
    rate = with_spread(metrics.SAMPLES.over(cells[best]))
    text = f"Asynchronous training on the stack `{best.stack}` trains on {rate} samples/s"
    text += f": {', and '.join(said)}." if said else "."
    efficiency = metrics.EFFICIENCY.over(cells[best])
    bound = metrics.BOUND.over(cells[best])
    if efficiency and bound:
        text += f" An update takes {seconds(bound.median / efficiency.median)}, its bound is {seconds(bound.median)}: "
        text += f"{efficiency.median:.2f} of the bound."
    return text + " Device time is emulated: this is orchestration alone." * (best.placement == "emulated")


def findings(results: Results) -> tuple[Finding, ...]:
    """Everything that can be said, the choice of a stack first."""
    cells = main_cells(results)
    rules: tuple[Callable[[], Iterable[Finding]], ...] = (
        lambda: _fastest_stack(cells),
        lambda: _turns(cells),
        lambda: _how_stale(cells),
        lambda: _learning(cells),
        lambda: transports(results),
        lambda: _lowest(cells, "start-up", metrics.FIRST_UPDATE, "reaches its first update"),
        lambda: _memory(cells),
        lambda: recovery(results),
        lambda: sizes(results),
        lambda: peers(by_cell(results.runs)),
        lambda: cautions(results, by_cell(results.runs)),
    )
    return tuple(finding for rule in rules for finding in rule())


def main_cells(results: Results) -> dict[CellKey, list[CellRun]]:
    """Those with one core per role, or, where there are none, those with emulated accelerators: never both."""
    cells = by_cell(results.runs)
    placement = next((key.placement for key in cells), "pinned")
    return {key: runs for key, runs in cells.items() if key.placement == placement}


def _median(metric: Metric, runs: Sequence[CellRun]) -> float:
    found = metric.over(runs)
    return found.median if found else 0.0


def _times_as_many(ratio: Spread, words: str) -> str:
    text = f"{times_with_spread(ratio)} what it does {words}"
    return text if ratio.apart(ONE) else f"{text} (no difference beyond the spread)"


def _widest(cells: Cells, mode: str) -> list[CellKey]:
    """The usual cells of a mode, of every stack the one with most staleness (a sweep has several)."""
    of = sorted((key for key in cells if key.mode == mode and usual(key)), key=lambda key: key.max_staleness)
    return sorted({(key.stack, key.num_generators): key for key in of}.values(), key=order_of)


def _fastest_stack(cells: Cells) -> Iterator[Finding]:
    for mode in reversed(MODES):
        values = {key.stack: found for key in _widest(cells, mode) if (found := metrics.UPDATE_P50.over(cells[key]))}
        if len(values) < 2:
            continue
        first, same, apart = ranked(values)
        about = f"stack for {mode}"
        if same:
            text = f"{listed(values, [first, *same])} for an update do not differ beyond their spread"
            text += f"; {listed(values, apart)} {'is' if len(apart) == 1 else 'are'} slower." if apart else (
                ": choose by what else a stack gives."
            )  # fmt: skip
        else:
            text = f"{first} has the lowest update time, {with_spread(values[first], 's')}; beyond the spread slower: "
            text += f"{listed(values, apart)}."
        yield Finding(about=about, text=text)


def _turns(cells: Cells) -> Iterator[Finding]:
    """Asynchronous against both synchronous baselines, stack by stack."""
    keys = _widest(cells, "async")
    for name, words in (("split", "in turns on the same cores"), ("colocated", "in turns on all cores")):
        ratios = {
            key.stack: ratio for key in keys if (ratio := getattr(speed_ups(cells, key), name)) is not None
        }  # fmt: skip
        if not ratios:
            continue
        said = []
        for kind, holds in (
            ("more on", lambda ratio: ratio.apart(ONE) and ratio.median > 1),
            ("no difference beyond the spread on", lambda ratio: not ratio.apart(ONE)),
            ("fewer on", lambda ratio: ratio.apart(ONE) and ratio.median < 1),
        ):
            of = [f"{stack} {times_with_spread(ratio)}" for stack, ratio in ratios.items() if holds(ratio)]
            said += [f"{kind} {', '.join(of)}"] * bool(of)
        text = f"Samples/s of asynchronous training against those {words}: {'; '.join(said)}."
        yield Finding(about=f"async or {words}", text=text)


def _how_stale(cells: Cells) -> Iterator[Finding]:
    """The least staleness that is as fast as any, per stack that was measured with several."""
    enough: dict[int, list[str]] = {}
    for stack in dict.fromkeys(key.stack for key in cells if usual(key)):
        of = {
            key.max_staleness: key
            for key in cells
            if key.stack == stack and usual(key) and key.mode != "sync-colocated" and key.num_generators == 1
        }
        if len(of) < 3:
            continue
        best = max(of.values(), key=lambda key: _median(metrics.SAMPLES, cells[key]))
        least = next(
            (bound for bound, key in sorted(of.items())
             if (ratio := ratio_of(cells[key], cells[best])) is not None and not ratio.apart(ONE)),
            None,
        )  # fmt: skip
        if least is None:
            continue
        rates = ", ".join(
            f"{bound}: {digits(_median(metrics.SAMPLES, cells[key]))}" for bound, key in sorted(of.items())
        )
        enough.setdefault(least, []).append(f"{stack} ({rates})")
    if enough:
        said = "; ".join(f"{bound} on {', '.join(stacks)}" for bound, stacks in sorted(enough.items()))
        yield Finding(
            about="staleness",
            text=f"The smallest `max_staleness` whose samples/s are those of the best, within the spread: {said}.",
        )


def final_reward(run: CellRun) -> float | None:
    """Mean reward of the last updates."""
    last = run.rewards[-max(1, round(len(run.rewards) * LAST_SHARE)) :]
    return sum(point.mean_reward for point in last) / len(last) if last else None


def _learning(cells: Cells) -> Iterator[Finding]:
    said: dict[str, list[str]] = {}
    for stack in dict.fromkeys(key.stack for key in cells if key.workload == "task"):
        of = {key.mode: cells[key] for key in cells if key.workload == "task" and key.stack == stack}
        rewards = {mode: found for mode, runs in of.items() if (found := spread_of(map(final_reward, runs)))}
        if "sync" not in rewards or "async" not in rewards:
            continue
        stale, fresh = rewards["async"], rewards["sync"]
        if not stale.apart(fresh):
            verdict = "does not differ beyond the spread"
        else:
            verdict = f"is {'higher' if stale.median > fresh.median else 'lower'}"
        said.setdefault(verdict, []).append(f"{stack} {with_spread(stale)} against {with_spread(fresh)}")
    if said:
        text = "; it ".join(f"{verdict} on {', '.join(of)}" for verdict, of in said.items())
        yield Finding(
            about="learning", text=f"The reward after as many updates, asynchronous against in turns, {text}."
        )


def _lowest(cells: Cells, about: str, metric: Metric, words: str) -> Iterator[Finding]:
    values = {key.stack: found for key in _widest(cells, "async") if (found := metric.over(cells[key]))}
    if len(values) < 2:
        return
    first, same, apart = ranked(values)
    if same:
        text = f"No stack {words} first beyond the spread: {listed(values, [first, *same, *apart])}."
    else:
        text = f"{first} {words} first, after {with_spread(values[first], 's')}; {listed(values, apart)}."
    yield Finding(about=about, text=text)


def whole_memory(run: CellRun) -> float | None:
    """Peak memory of all roles."""
    return float(sum(one.peak_memory_bytes for one in run.usage)) if run.usage else None


def _memory(cells: Cells) -> Iterator[Finding]:
    metric = Metric("peak_memory", "peak memory", "bytes", "lower", whole_memory)
    values = {key.stack: found for key in _widest(cells, "async") if (found := metric.over(cells[key]))}
    if len(values) > 1:
        first, same, apart = ranked(values)
        text = f"{listed(values, [first, *same], 'bytes')} take the least" if same else (
            f"{first} takes the least, {with_spread(values[first], 'bytes')}"
        )  # fmt: skip
        text += f"; {listed(values, apart, 'bytes')}." if apart else ", with no difference beyond the spread."
        yield Finding(about="memory", text=f"Peak memory of all roles: {text}")
