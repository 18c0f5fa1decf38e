"""What each role takes alone, in a process of its own: `python -m rl.bench.calibrate REQUEST.json RESULT.json`.

    open stack -> T_g: one update's groups after the other, the trainer idle
               -> T_t, T_w: updates by these groups, publications and loads, the generators idle
               -> W_g / G: as many groups in flight as a run has, for as long as the work of the measured updates takes
               -> T_p: loads while these run

The groups are those that the measured updates of a run by the same seed train on, so their lengths are the same too.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from statistics import fmean, median

from rl.bench.cells import CalibrationKey, run_config
from rl.bench.child import answer
from rl.bench.config import BenchConfig
from rl.bench.results import Calibration, CalibrationRun, CellKey
from rl.config import RunConfig
from rl.gather import gather
from rl.ledger import group_id
from rl.prompts import PromptSet
from rl.stack import GroupRequest, Stack, open_stack
from rl.types import Batch, Frozen, Group

_PAUSES = 5
"""Loads while groups are sampled."""


class CalibrationRequest(Frozen):
    """What a child is to measure."""

    config: BenchConfig
    key: CalibrationKey
    seed: int
    repeat: int


class _Alone:
    """An open stack whose parts are called one at a time."""

    def __init__(self, config: RunConfig, stack: Stack) -> None:
        self._config = config
        self._stack = stack
        self._prompts = PromptSet(config.tasks, "train", config.seed)
        self._version = 0

    async def generate(self, indices: range) -> tuple[float, tuple[Group, ...]]:
        """Seconds from idle generators to the last token, and the groups."""
        waiting = iter(indices)
        found: dict[int, Group] = {}
        began = time.perf_counter()

        async def ask(number: int) -> None:
            for index in waiting:
                found[index] = await self._group(number, index)

        await gather(ask(number) for number in self._askers())
        return time.perf_counter() - began, tuple(found[index] for index in indices)

    async def update(self, groups: tuple[Group, ...]) -> float:
        """Seconds."""
        batch = Batch(update=self._version, version=self._version, groups=groups)
        began = time.perf_counter()
        metrics = await self._stack.trainer.update(batch)
        self._version = metrics.version
        return time.perf_counter() - began

    async def bring(self) -> tuple[float, float, float, float]:
        """Seconds of snapshot, push, pull and reload, the last of them with its check of the weights."""
        began = time.perf_counter()
        published = await self._stack.trainer.publish()
        push_s = time.perf_counter() - began - published.snapshot_s
        pull_s, reload_s, _ = await self.load(published.version)
        return published.snapshot_s, push_s, pull_s, reload_s

    async def load(self, version: int | None = None) -> tuple[float, float, float]:
        """Seconds of pull, reload and pause of the slowest generator; by default the weights of now."""
        wanted = self._version if version is None else version
        began = time.perf_counter()
        loads = await gather(generator.load(wanted) for generator in self._stack.generators)
        took = time.perf_counter() - began
        pull_s = max(one.pull_s for one in loads)
        return pull_s, took - pull_s, max(one.pause_s for one in loads)

    @asynccontextmanager
    async def saturated(self, indices: Iterator[int]) -> AsyncIterator["asyncio.Queue[tuple[float, int]]"]:
        """As many groups in flight as a run has; the queue tells when each ended, and how many tokens it has."""
        ended: asyncio.Queue[tuple[float, int]] = asyncio.Queue()

        async def ask(number: int) -> None:
            for index in indices:
                group = await self._group(number, index)
                ended.put_nowait((time.perf_counter(), group.num_sampled))

        async with asyncio.TaskGroup() as tasks:
            askers = [tasks.create_task(ask(number)) for number in self._askers()]
            yield ended
            for asker in askers:
                asker.cancel()

    def _askers(self) -> list[int]:
        """The generator of each."""
        return [number for _ in range(self._config.groups_in_flight) for number in range(self._config.num_generators)]

    async def _group(self, number: int, index: int) -> Group:
        request = GroupRequest(
            group_id=group_id(index),
            prompt=self._prompts[index],
            group_size=self._config.group_size,
            seed=self._config.seed,
            settings=self._config.rollout,
        )
        return await self._stack.generators[number].generate(request)


async def calibrate(request: CalibrationRequest) -> CalibrationRun:
    """Open the stack, call its parts one at a time."""
    bench, key = request.config, request.key
    cell = CellKey(
        stack=key.stack,
        mode="sync-colocated" if key.colocated else "sync",
        engine=key.engine,
        placement="emulated" if bench.emulate_accelerators else "pinned",
        num_generators=bench.num_generators,
    )
    config = run_config(bench, cell, request.seed)
    async with open_stack(config) as stack:
        found = await _calibration(bench, config, _Alone(config, stack))
    return CalibrationRun(
        stack=key.stack,
        engine=key.engine,
        colocated=key.colocated,
        seed=request.seed,
        repeat=request.repeat,
        calibration=found,
    )


async def _calibration(bench: BenchConfig, config: RunConfig, alone: _Alone) -> Calibration:
    size, first, last = config.groups_per_update, bench.warmup_updates, bench.warmup_updates + bench.updates
    batches = [range(update * size, (update + 1) * size) for update in range(last)]
    # What takes longer when it is done for the first time.
    _, groups = await alone.generate(batches[0])
    await alone.update(groups)
    await alone.bring()

    generated = [await alone.generate(batch) for batch in batches[first:]]
    updates_s, weights_s = [], []
    for _, groups in generated:
        updates_s.append(await alone.update(groups))
        weights_s.append(await alone.bring())
    snapshot_s, push_s, pull_s, reload_s = (median(column) for column in zip(*weights_s, strict=True))

    in_flight = config.groups_in_flight * config.num_generators
    num_tokens = sum(group.num_sampled for _, groups in generated for group in groups)
    begin = max(0, first * size - in_flight)
    async with alone.saturated(itertools.count(begin)) as ended:
        for _ in range(in_flight):
            began_s, _ = await ended.get()
        ends = [await ended.get() for _ in range(size * bench.updates)]
        pauses_s = [(await alone.load())[2] for _ in range(_PAUSES)]
    tokens_per_s = sum(tokens for _, tokens in ends) / (ends[-1][0] - began_s)
    return Calibration(
        generate_saturated_s=num_tokens / bench.updates / tokens_per_s,
        generate_batch_s=fmean(seconds for seconds, _ in generated),
        update_s=fmean(updates_s),
        snapshot_s=snapshot_s,
        push_s=push_s,
        pull_s=pull_s,
        reload_s=reload_s,
        pause_s=median(pauses_s),
    )


def main() -> None:
    """The child."""
    answer(CalibrationRequest, lambda request: asyncio.run(calibrate(request)))


if __name__ == "__main__":
    main()
