"""What can be said of the parts that are measured beside the cells: transports, recovery, sizes, peers.

Each function goes from the results to sentences, none where nothing was measured.
"""

from collections.abc import Iterator

from rl.bench import metric as metrics
from rl.bench.finding import ONE, Finding, listed, ranked
from rl.bench.numbers import cell_name, size, times, times_with_spread, with_spread
from rl.bench.results import Results
from rl.bench.spread import PEERS, Cells, ratio_of, spread_of
from rl.bench.targets import ASYNC_EFFICIENCY, copy_ratios


def transports(results: Results) -> Iterator[Finding]:
    ratios = copy_ratios(results)
    if ratios:
        largest = max(ratios)
        ranked = sorted(ratios[largest].items(), key=lambda pair: pair[1])
        shown = ", ".join(f"{name} {times(ratio)}" for name, ratio in ranked)
        yield Finding(about="weights", text=f"{size(largest)} of weights, against a plain memory copy: {shown}.")


def recovery(results: Results) -> Iterator[Finding]:
    for killed in ("generator", "trainer"):
        of = [one for one in results.recoveries if one.killed == killed and not one.error]
        stacks = dict.fromkeys(one.stack for one in of)
        values = {
            stack: found for stack in stacks if (found := spread_of(one.back_s for one in of if one.stack == stack))
        }
        if not values:
            continue
        lost, doubled = sum(one.samples_lost for one in of), sum(one.samples_doubled for one in of)
        text = (
            f"A killed {killed} is there again after: {listed(values, sorted(values, key=lambda s: values[s].median))}"
        )
        nothing = f" In {len(of)} kills nothing was lost and nothing trained on twice."
        text += f".{nothing if not lost + doubled else f' {lost} groups were lost, {doubled} trained on twice.'}"
        if len(values) > 1:
            first, same, _ = ranked(values)
            text += " No stack is first beyond the spread." if same else f" {first} is first beyond the spread."
        yield Finding(about=f"loss of a {killed}" if killed == "generator" else "loss of the trainer", text=text)


def sizes(results: Results) -> Iterator[Finding]:
    points = [one for one in results.simulations if one.update_s > 0 and one.bound_s > 0]
    for kind in dict.fromkeys((one.placement, one.stack) for one in points):
        of = [one for one in points if (one.placement, one.stack) == kind]
        if len({one.num_generators for one in of}) < 2:
            continue
        best = {
            count: max(one.bound_s / one.update_s for one in of if one.num_generators == count)
            for count in sorted({one.num_generators for one in of})
        }
        good = [count for count, of_bound in best.items() if of_bound >= ASYNC_EFFICIENCY]
        last = max(best)
        text = f"With {last:,} generators ({kind[0]}, {kind[1]}) the best setting reaches {best[last]:.2f} of its bound"
        text += f"; {ASYNC_EFFICIENCY} is reached up to {max(good):,}." if good else (
            f"; {ASYNC_EFFICIENCY} is reached at no size."
        )  # fmt: skip
        yield Finding(about="size", text=text)


def peers(cells: Cells) -> Iterator[Finding]:
    for peer in (key for key in cells if key.stack in PEERS):
        ours = {
            key: ratio
            for key, runs in cells.items()
            if key.stack not in PEERS and key.workload == peer.workload and key.placement == peer.placement
            if (ratio := ratio_of(runs, cells[peer])) is not None
        }
        for engine in dict.fromkeys(key.engine for key in ours):
            best = max((key for key in ours if key.engine == engine), key=lambda key: ours[key].median)
            ratio = ours[best]
            verdict = "" if ratio.apart(ONE) else ", no difference beyond the spread"
            same = " Our engine lets go of rows that have ended, TRL's computes them on to the end of its batch."
            yield Finding(
                about="TRL",
                text=f"{cell_name(best)} has {times_with_spread(ratio)} the samples/s of {cell_name(peer)}{verdict} "
                f"({with_spread(metrics.SAMPLES.over(cells[best]))} and "
                f"{with_spread(metrics.SAMPLES.over(cells[peer]))}).{same * (engine == peer.engine)}",
            )
