"""One run of a cell, in a process of its own: `python -m rl.bench.cell REQUEST.json RESULT.json`.

CellRequest -> rl.train.train on a metered stack, stopped after the measured updates -> CellRun
"""

import asyncio
from pathlib import Path

import psutil

from rl.bench.cells import cores_of, num_updates, run_config
from rl.bench.child import answer
from rl.bench.config import BenchConfig
from rl.bench.measure import RunFacts, measured
from rl.bench.meter import Meter
from rl.bench.results import CellRun, Role
from rl.bench.usage import cpu_s, peak_memory_bytes, usage
from rl.metrics import RunEvent, UpdateRecord
from rl.stack import open_stack
from rl.train import train
from rl.types import Frozen, TrainMetrics


class CellRequest(Frozen):
    """What a child is to measure."""

    config: BenchConfig
    run: CellRun
    """Without numbers."""
    folder: str
    """Where the run may live."""


async def run_cell(request: CellRequest) -> CellRun:
    """The run with its numbers. Raises what `rl.train.train` raises."""
    config, run = request.config, request.run
    warmup, wanted = config.warmup_updates, num_updates(config, run.key)
    records: list[UpdateRecord] = []
    stop = asyncio.Event()
    before: dict[Role, float] = {}
    after: dict[Role, float] = {}
    memory: dict[Role, int] = {}

    def report(event: RunEvent) -> None:
        if isinstance(event, UpdateRecord):
            records.append(event)

    def updated(metrics: TrainMetrics) -> None:
        done = metrics.update + 1
        if done == warmup:
            before.update(cpu_s(meter.trace.processes))
        if done == warmup + wanted:
            after.update(cpu_s(meter.trace.processes))
            memory.update(peak_memory_bytes(meter.trace.processes))
            stop.set()

    meter = Meter(updated)
    result = await train(
        run_config(config, run.key, run.seed),
        str(Path(request.folder, "run")),
        report=report,
        stop=stop,
        open_stack=meter.metered(open_stack),
    )
    trainer, generators = cores_of(config)
    facts = RunFacts(
        trace=meter.trace,
        records=records,
        tokens=result.tokens,
        began_at=psutil.Process().create_time(),
        usage=usage(before, after, memory),
        warmup_updates=warmup,
        num_updates=wanted,
        num_cores=len({*trainer, *(core for cores in generators for core in cores)}),
    )
    return measured(run, facts)


def main() -> None:
    """The child."""
    answer(CellRequest, lambda request: asyncio.run(run_cell(request)))


if __name__ == "__main__":
    main()
