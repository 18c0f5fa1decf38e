"""A stack whose calls take their time by a latency model: the parts of `rl.stacks.scripted` behind the cost of calls.

loop -> Desk (one call at a time) -> way there and back -> ScriptedGenerator | ScriptedTrainer
"""

import asyncio
import random

from rl.bench.latency import Latencies
from rl.config import RunConfig
from rl.ledger import group_id
from rl.stack import GroupRequest, Loaded, Published
from rl.stacks.scripted import Script, ScriptedGenerator, ScriptedStack, ScriptedTrainer
from rl.types import Batch, Group, TrainMetrics


class Desk:
    """The loop's process, where every call takes its turn."""

    def __init__(self, latencies: Latencies) -> None:
        self._busy_s = latencies.loop_s_per_call
        self._way_s = latencies.call_s
        self._free_at = 0.0

    async def call(self) -> None:
        """Take the time of a call, but for its work."""
        if not self._busy_s and not self._way_s:
            return
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now) + self._busy_s
        await asyncio.sleep(self._free_at - now + self._way_s)


class SimulatedGenerator:
    """A `Generator` behind the desk."""

    def __init__(self, part: ScriptedGenerator, desk: Desk) -> None:
        self._part = part
        self._desk = desk

    async def generate(self, request: GroupRequest) -> Group:
        """The group, after the call and the work."""
        await self._desk.call()
        return await self._part.generate(request)

    async def load(self, version: int) -> Loaded:
        """The newest weights, after the call and the work."""
        await self._desk.call()
        return await self._part.load(version)


class SimulatedTrainer:
    """A `Trainer` behind the desk."""

    def __init__(self, part: ScriptedTrainer, desk: Desk) -> None:
        self._part = part
        self._desk = desk
        self.updated_at: list[float] = []
        """[updates] ends, on the event loop's clock."""
        self._in_order = asyncio.Event()
        self._in_order.set()

    async def update(self, batch: Batch) -> TrainMetrics:
        """One update, after the call and the work."""
        await self._desk.call()
        await self._in_order.wait()
        metrics = await self._part.update(batch)
        self.updated_at.append(asyncio.get_running_loop().time())
        return metrics

    async def publish(self) -> Published:
        """The version, after the call and the work; the call of the next update, on its way too, comes behind it."""
        self._in_order.clear()
        await self._desk.call()
        published = asyncio.create_task(self._part.publish())
        # The part has taken its turn by then.
        asyncio.get_running_loop().call_soon(self._in_order.set)
        return await published

    async def save(self, folder: str) -> None:
        """The groups of every update."""
        await self._part.save(folder)


class SimulatedStack:
    """A `Stack` that never loses a part."""

    def __init__(self, config: RunConfig, latencies: Latencies) -> None:
        self._generated_s: dict[str, float] = {}
        script = Script(
            generate_s=self._generate_s,
            update_s=latencies.update_s,
            snapshot_s=latencies.snapshot_s,
            push_s=latencies.push_s,
            load_s=latencies.load_s,
            save_s=0.0,
            num_tokens=1,
        )
        self._latencies = latencies
        self._stack = ScriptedStack(config, script=script)
        desk = Desk(latencies)
        self.trainer = SimulatedTrainer(self._stack.trainer, desk)
        self.generators = [SimulatedGenerator(part, desk) for part in self._stack.generators]

    @property
    def trained_s(self) -> list[list[float]]:
        """[updates][groups] what each group took, in the order of the prompts."""
        trained = self._stack.trainer.trained
        return [[self._generated_s[group_id(index)] for index in sorted(groups)] for groups in trained]

    async def replace_generator(self, number: int, version: int) -> None:
        """Never called: nothing is lost here."""
        raise AssertionError(f"generator {number} was not lost")

    async def replace_trainer(self, folder: str) -> None:
        """Never called: nothing is lost here."""
        raise AssertionError("the trainer was not lost")

    def _generate_s(self, request: GroupRequest) -> float:
        """The same for the same group."""
        drawn = random.Random(f"{request.seed}/{request.group_id}")
        took_s = drawn.lognormvariate(self._latencies.generate_mu, self._latencies.generate_sigma)
        self._generated_s[request.group_id] = took_s
        return took_s
