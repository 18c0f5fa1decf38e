"""Simulations: what is fitted to a run that was measured, and what the loop does at sizes that nobody measured."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import fmean, pstdev
from typing import Literal, TypeVar

import pytest

from rl.bench.config import BenchConfig
from rl.bench.latency import Latencies, fit
from rl.bench.results import CellKey, CellRun, ControlPlane, Machine, Results, RoleUsage, Span, WeightSync
from rl.bench.simulate import measured_point, plan, scaled_point, simulate, simulated
from rl.config import RunConfig
from rl.stack import GroupRequest, Loaded, Published
from rl.stacks.scripted import Script, ScriptedGenerator, ScriptedStack, ScriptedTrainer, long_tailed
from rl.train import train
from rl.types import Batch, Group, TrainMetrics
from rl.virtual_clock import run_virtually

Result = TypeVar("Result")

KEY = CellKey(stack="ray", mode="async", num_generators=2, max_staleness=4)
BENCH = BenchConfig(groups_per_update=4, groups_in_flight=3, num_generators=2, staleness=4)
TRUTH = Script(generate_s=lambda request: 0.5 * long_tailed(request), update_s=0.5, num_tokens=1)
CALL_S = 0.02
TAIL = Latencies(
    stack="ray",
    update_s=1.0,
    snapshot_s=0.01,
    push_s=0.05,
    load_s=0.1,
    generate_mu=-0.32,
    generate_sigma=0.8,
)
"""A group takes as long as an update on average: exp(-0.32 + 0.8**2 / 2) s."""


class Watched:
    """A trainer or a generator behind calls that take their time, and what it was asked for."""

    def __init__(self, part: ScriptedTrainer | ScriptedGenerator, role: str, spans: list[Span]) -> None:
        self._part, self._role, self._spans = part, role, spans

    async def update(self, batch: Batch) -> TrainMetrics:
        assert isinstance(self._part, ScriptedTrainer)
        return await self._watch("update", self._part.update(batch))

    async def publish(self) -> Published:
        assert isinstance(self._part, ScriptedTrainer)
        # On its way before the next update, and so before it there.
        await asyncio.sleep(0.99 * CALL_S)
        return await self._part.publish()

    async def save(self, folder: str) -> None:
        assert isinstance(self._part, ScriptedTrainer)
        await self._part.save(folder)

    async def generate(self, request: GroupRequest) -> Group:
        assert isinstance(self._part, ScriptedGenerator)
        return await self._watch("generate", self._part.generate(request))

    async def load(self, version: int) -> Loaded:
        assert isinstance(self._part, ScriptedGenerator)
        return await self._watch("load", self._part.load(version))

    async def _watch(self, kind: Literal["update", "generate", "load"], work: Awaitable[Result]) -> Result:
        clock = asyncio.get_running_loop().time
        begin_s = clock()
        await asyncio.sleep(CALL_S)
        result = await work
        self._spans.append(Span(role=self._role, kind=kind, begin_s=begin_s, end_s=clock(), version=0))
        return result


class WatchedStack:
    """The ground truth: a scripted stack whose durations nobody is told."""

    def __init__(self, config: RunConfig, spans: list[Span]) -> None:
        stack = ScriptedStack(config, script=TRUTH)
        self.trainer = Watched(stack.trainer, "trainer", spans)
        self.generators = [Watched(part, f"generator {number}", spans) for number, part in enumerate(stack.generators)]

    async def replace_generator(self, number: int, version: int) -> None:
        raise AssertionError

    async def replace_trainer(self, folder: str) -> None:
        raise AssertionError


def measured_run(folder: Path, updates: int = 120, warmup: int = 10) -> CellRun:
    """A run of the ground truth, as the benchmark would have measured it."""
    config = RunConfig(
        stack="scripted",
        updates=updates,
        groups_per_update=BENCH.groups_per_update,
        group_size=1,
        groups_in_flight=BENCH.groups_in_flight,
        num_generators=KEY.num_generators,
        max_staleness=KEY.max_staleness,
        filter_zero_variance=False,
        evaluation_prompts=1,
        checkpoint_every=1000,
        stuck_after_s=1e6,
    )
    spans: list[Span] = []

    @asynccontextmanager
    async def open_stack(config: RunConfig, folder: str) -> AsyncIterator[WatchedStack]:
        yield WatchedStack(config, spans)

    run_virtually(train(config, str(folder), open_stack=open_stack))
    ends = [span.end_s for span in spans if span.kind == "update"][warmup - 1 : updates - 5]
    began = ends[0]
    timeline = [
        span.model_copy(update={"begin_s": span.begin_s - began, "end_s": span.end_s - began})
        for span in spans
        if began < span.end_s <= ends[-1]
    ]
    count = len(ends) - 1
    return CellRun(
        key=KEY,
        seed=0,
        repeat=0,
        order=0,
        load_before=0.0,
        num_updates=count,
        duration_s=ends[-1] - began,
        weights=WeightSync(
            num_bytes=1 << 20, snapshot_s=0.01, push_s=0.1, pull_s=0.1, reload_s=0.0, pause_s=0.0, exposed_s=0.0
        ),
        control=ControlPlane(
            call_p50_s=CALL_S, call_p99_s=CALL_S, messages_per_update=14.0, bytes_per_update=0.0, overhead_s=0.0
        ),
        usage=(RoleUsage(role="loop", peak_memory_bytes=0, cpu_s=1.0),),
        timeline=tuple(timeline),
    )


def results(*runs: CellRun) -> Results:
    machine = Machine(processor="", num_cores=2, memory_bytes=0, system="", python="", versions={})
    config = BENCH.model_dump(mode="json")
    return Results(
        started_at="2026-01-01T00:00:00",
        duration_s=0.0,
        commit="",
        quick=True,
        config=config,
        machine=machine,
        runs=runs,
    )


def test_a_measured_cell_is_simulated_as_it_was_measured(tmp_path: Path) -> None:
    run = measured_run(tmp_path)
    latencies = fit([run])
    assert latencies is not None
    groups_s = [0.5 * math.exp(0.8**2 / 2), 0.8]
    assert latencies.mean_generate_s == pytest.approx(groups_s[0], rel=0.1)
    assert latencies.generate_sigma == pytest.approx(groups_s[1], rel=0.1)
    assert latencies.load_s == pytest.approx(TRUTH.load_s)
    assert latencies.update_s == pytest.approx(TRUTH.update_s, rel=0.01)
    again = simulated(measured_point(BENCH, KEY, latencies))
    assert again.update_s == pytest.approx(run.duration_s / run.num_updates, rel=0.1)
    assert (again.stack, again.num_generators, again.max_staleness) == ("ray", 2, 4)


def test_the_fit_keeps_the_mean_and_the_spread() -> None:
    groups_s = [0.2, 0.3, 0.4, 2.0]
    timeline = [
        Span(role="generator 0", kind="generate", begin_s=1.0, end_s=1.0 + seconds, version=0) for seconds in groups_s
    ]
    # It reaches out of the timeline: what is that long reaches out of it often, and would be counted too often.
    timeline.append(Span(role="generator 0", kind="generate", begin_s=1.0, end_s=9.0, version=0))
    timeline += [
        Span(role="trainer", kind="update", begin_s=2.0, end_s=4.0, version=0),
        Span(role="generator 0", kind="load", begin_s=2.0, end_s=2.5, version=0),
    ]
    weights = WeightSync(num_bytes=1, snapshot_s=0.1, push_s=0.2, pull_s=0.3, reload_s=0.2, pause_s=0.0, exposed_s=0.0)
    run = CellRun(
        key=KEY, seed=0, repeat=0, order=0, load_before=0.0, num_updates=1, weights=weights, timeline=tuple(timeline)
    )
    latencies = fit([run, run.model_copy(update={"error": "broken"})])
    assert latencies is not None
    assert latencies.mean_generate_s == pytest.approx(fmean(groups_s))
    assert latencies.generate_sigma == pytest.approx(pstdev(map(math.log, groups_s)))
    assert (latencies.update_s, latencies.load_s, latencies.push_s) == (2.0 - 0.1, 0.5, 0.2)
    assert (latencies.call_s, latencies.loop_s_per_call) == (0.0, 0.0)


def test_synchronous_updates_take_what_the_formula_says() -> None:
    point = simulated(scaled_point(TAIL, 8, 0, "pace"))
    assert point.update_s == pytest.approx(point.bound_s)
    assert point.staleness_mean == 0
    assert point.trainer_idle > 0.6


def test_a_heavy_tail_needs_staleness_and_dropping_needs_less_of_it() -> None:
    policies: tuple[Literal["pace", "drop"], ...] = ("pace", "drop")
    found = {
        (staleness, policy): simulated(scaled_point(TAIL, 16, staleness, policy))
        for staleness in (1, 4, 8)
        for policy in policies
    }
    reached = {key: point.bound_s / point.update_s for key, point in found.items()}
    assert reached[1, "pace"] < reached[1, "drop"] < 0.9
    assert reached[4, "drop"] > 0.95 > reached[4, "pace"] > reached[1, "pace"]
    assert reached[8, "pace"] > reached[4, "pace"]
    assert max(reached.values()) < 1.01
    assert all(point.staleness_mean <= point.max_staleness for point in found.values())
    assert all(point.wasted_share == 0 for point in found.values() if point.policy == "pace")
    assert found[1, "drop"].wasted_share > found[4, "drop"].wasted_share > 0


def test_calls_wait_for_each_other_in_the_loop() -> None:
    costly = TAIL.model_copy(update={"loop_s_per_call": 0.05})
    few, many = (simulated(scaled_point(costly, size, 8, "drop")) for size in (4, 64))
    # One call for each group and each load, and one update.
    assert many.update_s > 2 * 64 * 0.05
    assert few.bound_s / few.update_s > 0.9
    assert many.bound_s / many.update_s < 0.2


def test_all_points_of_a_short_benchmark(tmp_path: Path) -> None:
    run = measured_run(tmp_path)
    other = KEY.model_copy(update={"stack": "monarch"})
    failed = CellRun(key=other, seed=0, repeat=0, order=0, load_before=0.0, error="it broke")
    given = results(run, failed)
    found = simulate(given, quick=True)
    points = plan(given, quick=True)
    assert len(found) == len(points)
    assert found[-1] == simulated(points[-1]), "the same on every machine, in any process"
    assert found[0].num_generators == KEY.num_generators
    scaled = found[1:]
    assert {point.num_generators for point in scaled} == {8, 64}
    assert {point.stack for point in scaled} == {"loop", "ray"}
    assert {point.policy for point in scaled} == {"pace", "drop"}
    assert {point.max_staleness for point in scaled if point.num_generators == 8} == {0, 1, 2, 4, 8, 16}
    assert all(point.update_s > 0.98 * point.bound_s for point in scaled)
    assert {point.num_generators for point in plan(given, quick=False)} >= {8, 64, 256, 1024}


def test_nothing_is_simulated_that_nothing_was_measured_of() -> None:
    assert simulate(results(), quick=True) == []
