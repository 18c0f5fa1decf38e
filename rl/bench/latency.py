"""How long the calls of a stack take: fitted to what was measured, for simulations of sizes that nobody measured.

CellRun (timeline, weights, control plane, CPU seconds) of one stack -> fit -> Latencies -> rl.bench.simulate
"""

from collections.abc import Iterable, Sequence
from math import exp, log
from statistics import fmean, median, pstdev

from rl.bench.results import CellRun, Span
from rl.types import Frozen

_SHORTEST_S = 1e-6
"""Logarithms of durations are taken."""


class Latencies(Frozen):
    """Of one stack's calls, in seconds, as the loop sees them but for what a call without work takes."""

    stack: str
    update_s: float
    snapshot_s: float
    push_s: float
    load_s: float
    """Pull and reload of one generator."""
    generate_mu: float
    """A group takes log-normally long in a generator that always has others in flight: mean of the logarithm."""
    generate_sigma: float
    call_s: float = 0.0
    """A call without work, there and back."""
    loop_s_per_call: float = 0.0
    """What a call keeps the loop's own process busy for: calls wait for each other there, however many generators."""

    @property
    def mean_generate_s(self) -> float:
        """Of a group."""
        return exp(self.generate_mu + self.generate_sigma**2 / 2)

    def without_stack(self, name: str = "loop") -> "Latencies":
        """The same work where a call costs nothing."""
        return self.model_copy(update={"stack": name, "call_s": 0.0, "loop_s_per_call": 0.0})


def fit(runs: Iterable[CellRun]) -> Latencies | None:
    """From runs of one stack that did the same work; None where none of them has what is needed."""
    whole = [run for run in runs if not run.error and run.weights is not None and _is_whole(run.timeline)]
    if not whole:
        return None
    controls = [run.control for run in whole if run.control is not None]
    call_s = median(control.call_p50_s for control in controls) if controls else 0.0
    spans = [span for run in whole for span in _that_end(run.timeline)]
    weights = [run.weights for run in whole if run.weights is not None]
    groups_s = _durations(spans, "generate", call_s)
    sigma = pstdev(map(log, groups_s))
    snapshot_s = median(each.snapshot_s for each in weights)
    return Latencies(
        stack=whole[0].key.stack,
        # The call comes while the trainer still copies the weights of the update before.
        update_s=max(_SHORTEST_S, median(_durations(spans, "update", call_s)) - snapshot_s),
        snapshot_s=snapshot_s,
        push_s=median(each.push_s for each in weights),
        load_s=median(_durations(spans, "load", call_s)),
        # The mean is what throughput depends on, so it is kept as it was measured.
        generate_mu=log(fmean(groups_s)) - sigma**2 / 2,
        generate_sigma=sigma,
        call_s=call_s,
        loop_s_per_call=median(map(_loop_s_per_call, whole)),
    )


def _is_whole(timeline: Sequence[Span]) -> bool:
    return {"update", "generate", "load"} <= {span.kind for span in timeline}


def _that_end(timeline: Sequence[Span]) -> list[Span]:
    """Of the work that reaches into the timeline, what ends within it: long work reaches into it more often."""
    end_s = max(span.end_s for span in timeline if span.kind == "update")
    return [span for span in timeline if span.end_s <= end_s]


def _durations(spans: Iterable[Span], kind: str, call_s: float) -> list[float]:
    """Without what the call itself takes."""
    return [max(_SHORTEST_S, span.end_s - span.begin_s - call_s) for span in spans if span.kind == kind]


def _loop_s_per_call(run: CellRun) -> float:
    """CPU seconds of the loop for one call; 0 where the loop shares its process with generators, which hides them.

    What the loop's process does beside its calls does not grow with them, so it is never more than a whole round trip.
    """
    loop = [usage.cpu_s for usage in run.usage if usage.role == "loop"]
    if run.key.stack == "local" or not loop or run.control is None or not run.control.messages_per_update:
        return 0.0
    return min(run.control.call_p50_s, loop[0] / (run.num_updates * run.control.messages_per_update / 2))
