"""Sizes that this machine does not have, in virtual time: the real loop and its buffer, parts by fitted latencies.

    Results -> fit of each stack -> Point, ... -> train(config, SimulatedStack) on a virtual clock -> Simulation

The first point of a stack is a cell that was measured, so that one can see what the simulation is worth. In all others
a generator samples one group at a time, which takes as long as it was measured to take in a busy generator; the trainer
grows along with the generators, so that an update takes as long as it was measured to take, and has so many groups that
sampling them takes as long. What bytes cost a network, and memory that generators of one machine share, is not in it.
"""

import asyncio
import heapq
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from multiprocessing import get_context
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Literal

from rl.bench.config import BenchConfig
from rl.bench.latency import Latencies, fit
from rl.bench.results import CellKey, CellRun, Results, Simulation
from rl.bench.simulated_stack import SimulatedStack
from rl.config import RunConfig
from rl.metrics import RunEvent, UpdateRecord
from rl.train import train
from rl.types import Frozen
from rl.virtual_clock import run_virtually

NUM_GENERATORS = (8, 64, 256, 1024)
STALENESS = (0, 1, 2, 4, 8, 16)
SWEPT_GENERATORS = 64
"""Of the points that differ in their staleness."""
_STALENESS = 8
"""Of the points that differ in their number of generators."""
_STACKS_STALENESS = 4
"""Of those of a stack, by policy `drop`: what calls cost is to be seen, not what lengths do."""
_POLICIES: tuple[Literal["pace", "drop"], ...] = ("pace", "drop")
_GROUPS, _FEW_GROUPS = 2000, 800
"""Of the measured updates together, unless these are then too few or too many: a long tail shows in many groups."""
_MOST_UPDATES, _FEWEST_UPDATES = 200, 8
_FEWEST_PACED = 24
"""Updates by policy `pace`, which now and then wait long for one group, the longer the more groups there are."""
_POINT_TIMEOUT_S = 300.0
_NEVER = 10**6


class Point(Frozen):
    """One run to be simulated."""

    latencies: Latencies
    num_generators: int
    groups_in_flight: int
    groups_per_update: int
    max_staleness: int
    policy: Literal["pace", "drop"]
    num_groups: int = _GROUPS
    """Of the measured updates together, about."""

    @property
    def warmup_updates(self) -> int:
        """Until the staleness is what it will be."""
        return max(self.max_staleness + 4, self.max_staleness**2 // 4)

    @property
    def num_updates(self) -> int:
        """Measured ones."""
        fewest = _FEWEST_PACED if self.policy == "pace" else _FEWEST_UPDATES
        return min(_MOST_UPDATES, max(fewest, self.num_groups // self.groups_per_update))


def simulate(results: Results, quick: bool) -> list[Simulation]:
    """All points, by what was measured; none where no cell was measured whose calls could be fitted."""
    points = plan(results, quick)
    if not points:
        return []
    workers = min(len(points), os.cpu_count() or 1, 4)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        # Those that take longest begin first.
        order = sorted(range(len(points)), key=lambda number: -points[number].num_generators)
        found = list(pool.map(simulated, [points[number] for number in order], timeout=_POINT_TIMEOUT_S))
    return [found[order.index(number)] for number in range(len(points))]


def plan(results: Results, quick: bool) -> list[Point]:
    """The points of `simulate`, stack by stack."""
    config = BenchConfig.model_validate(results.config)
    points: list[Point] = []
    fitted: list[Latencies] = []
    for key, runs in _busiest(results.runs).items():
        latencies = fit(runs)
        if latencies is not None:
            fitted.append(latencies)
            points.append(measured_point(config, key, latencies))
    if not fitted:
        return []
    sizes = NUM_GENERATORS[:2] if quick else NUM_GENERATORS
    bare = fitted[0].without_stack()
    points += [scaled_point(bare, size, _STALENESS, policy) for size in sizes for policy in _POLICIES]
    for latencies in fitted:
        # Where generators are in the loop's own process, their calls cost nothing.
        if latencies.loop_s_per_call:
            points += [scaled_point(latencies, size, _STACKS_STALENESS, "drop") for size in sizes]
    swept = sizes[0] if quick else SWEPT_GENERATORS
    points += [
        scaled_point(bare, swept, staleness, policy)
        for staleness in STALENESS
        for policy in _POLICIES
        if staleness != _STALENESS
    ]
    return [point.model_copy(update={"num_groups": _FEW_GROUPS}) for point in points] if quick else points


def measured_point(config: BenchConfig, key: CellKey, latencies: Latencies) -> Point:
    """The run that was measured, as it was."""
    return Point(
        latencies=latencies,
        num_generators=key.num_generators,
        groups_in_flight=config.groups_in_flight,
        groups_per_update=config.groups_per_update,
        max_staleness=key.max_staleness,
        policy=config.stale_policy,
    )


def scaled_point(latencies: Latencies, num_generators: int, staleness: int, policy: Literal["pace", "drop"]) -> Point:
    """So many groups an update that generators and trainer take equally long."""
    balanced = num_generators * latencies.update_s / latencies.mean_generate_s
    return Point(
        latencies=latencies,
        num_generators=num_generators,
        groups_in_flight=1,
        groups_per_update=max(1, round(balanced)),
        max_staleness=staleness,
        policy=policy,
    )


def simulated(point: Point) -> Simulation:
    """One run on a virtual clock: the same for the same point, on every machine."""
    latencies = point.latencies
    first = point.warmup_updates
    last = first + point.num_updates
    stack, records = run_virtually(_run(point, last))
    ends = stack.trainer.updated_at
    window = [record for record in records if first <= record.train.update < last]
    before = next(record for record in records if record.train.update == first - 1)
    generated = window[-1].tokens.generated - before.tokens.generated
    shares = [record.shares for record in window]
    span_s = sum(share.duration_s for share in shares)
    return Simulation(
        placement="simulated",
        stack=latencies.stack,
        num_generators=point.num_generators,
        max_staleness=point.max_staleness,
        policy=point.policy,
        update_s=(ends[last - 1] - ends[first - 1]) / point.num_updates,
        bound_s=bound_s(point, stack.trained_s[first:last]),
        wasted_share=(window[-1].tokens.wasted - before.tokens.wasted) / generated if generated else 0.0,
        staleness_mean=fmean(age for record in window for age in record.staleness),
        trainer_idle=sum(share.trainer_idle * share.duration_s for share in shares) / span_s,
        generator_idle=max(0.0, sum(share.generator_idle * share.duration_s for share in shares) / span_s),
    )


def bound_s(point: Point, batches_s: Sequence[Sequence[float]]) -> float:
    """As `rl.bench.bound` has it, for updates whose groups took so long each: `max(W_g/G, T_t + T_snapshot)`, or, for
    a staleness of 0, `T_g + T_t + T_w`."""
    latencies, places = point.latencies, point.num_generators * point.groups_in_flight
    trainer_s = latencies.update_s + latencies.snapshot_s
    if point.max_staleness:
        # What was sampled before is used up in a window whose groups are longer than most: that can go on for a while.
        work_s = min(fmean(map(sum, batches_s)), point.groups_per_update * latencies.mean_generate_s)
        return max(work_s / places, trainer_s)
    generate_s = fmean(_last_end_s(batch, places) for batch in batches_s)
    return generate_s + trainer_s + latencies.push_s + latencies.load_s


def _last_end_s(groups_s: Iterable[float], places: int) -> float:
    """When all are done that begin in their order, each where a place is free."""
    free_at = [0.0] * places
    for group_s in groups_s:
        heapq.heapreplace(free_at, free_at[0] + group_s)
    return max(free_at)


async def _run(point: Point, updates: int) -> tuple[SimulatedStack, list[UpdateRecord]]:
    """So many updates of a run that would go on."""
    config = RunConfig(
        stack="scripted",
        updates=_NEVER,
        groups_per_update=point.groups_per_update,
        group_size=1,
        groups_in_flight=point.groups_in_flight,
        num_generators=point.num_generators,
        max_staleness=point.max_staleness,
        stale_policy=point.policy,
        filter_zero_variance=False,
        evaluation_prompts=1,
        checkpoint_every=_NEVER,
        stuck_after_s=_NEVER,
    )
    stack = SimulatedStack(config, point.latencies)
    records: list[UpdateRecord] = []
    stop = asyncio.Event()

    def report(event: RunEvent) -> None:
        if isinstance(event, UpdateRecord):
            records.append(event)
            if event.train.version >= updates:
                stop.set()

    @asynccontextmanager
    async def open_stack(config: RunConfig, folder: str) -> AsyncIterator[SimulatedStack]:
        yield stack

    with TemporaryDirectory(prefix="orchestrate-simulation-") as folder:
        await train(config, folder, report=report, stop=stop, open_stack=open_stack)
    return stack, records


def _busiest(runs: Sequence[CellRun]) -> dict[CellKey, list[CellRun]]:
    """The most asynchronous cell of each stack, where generators are never short of work, and its runs."""
    keys: dict[str, CellKey] = {}
    for run in runs:
        key = run.key
        if run.error or key.workload != "tail" or key.mode != "async" or key.engine not in ("vllm", "emulated"):
            continue
        if key.stack not in keys or key.max_staleness > keys[key.stack].max_staleness:
            keys[key.stack] = key
    return {key: [run for run in runs if run.key == key and not run.error] for key in keys.values()}
