"""The loop: one for synchronous, one-step-off and asynchronous training.

    Buffer.admit -> Generator.generate -> Buffer.finish -> Buffer.take -> Trainer.update -> Trainer.publish
         ^                                                                                        |
         '--------------- Buffer.release <- Generator.load (all of them) <-----------------------'

| who                        | waits for                               | is woken by                        |
|----------------------------|-----------------------------------------|------------------------------------|
| asker (several a generator) | a place                                 | weights that are live, a filtered group |
| trainer                    | the groups of its next update           | `Buffer.finish`                    |
| trainer                    | the publication of the update before    | the last generator's `load`        |
| publication                | every generator                         | `load`, or a generator's replacement |

Nothing polls. Publication and loading run beside the next update. A generator that is lost is replaced, and its groups
are sampled again. A trainer that is lost ends `Loop.run` with `TrainerLost`; `rl.train` goes on from the checkpoint.
Any other error ends the run.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rl.buffer import Buffer
from rl.busy import BusyTime
from rl.checkpoint import Checkpoints
from rl.config import RunConfig
from rl.evaluation import evaluation_report
from rl.gather import gather
from rl.ledger import RunState, group_id
from rl.metrics import EvaluationRecord, Notice, Phases, Report, UpdateRecord
from rl.prompts import PromptSet
from rl.stack import GroupRequest, Loaded, PartLost, Published, Stack, WeightsLost
from rl.types import UNSAMPLED, Batch, Group, TrainMetrics, Trajectory
from rl.watchdog import Watchdog

Result = TypeVar("Result")

_MOST_LOSSES = 3
"""Times in a row that one generator may be lost before it finished a group; the next loss ends the run."""


class TrainerLost(Exception):
    """The trainer's process is gone; the run can go on from its last checkpoint."""


class Diverged(Exception):
    """An update was no number, so there is nothing to go on from. The argument says which."""


@dataclass(frozen=True)
class _Done:
    """An update whose weights are on their way."""

    batch: Batch
    metrics: TrainMetrics
    phases: Phases
    updated: float
    num_waiting: int


class Loop:
    """One run on an open stack, from one state to its end."""

    def __init__(
        self,
        config: RunConfig,
        stack: Stack,
        state: RunState,
        checkpoints: Checkpoints,
        watchdog: Watchdog,
        report: Report,
        stop: asyncio.Event | None = None,
    ) -> None:
        """`stop` ends the run before its next update, with a checkpoint to go on from."""
        self._config = config
        self._stack = stack
        self._checkpoints = checkpoints
        self._watchdog = watchdog
        self._report = report
        self._stop = asyncio.Event() if stop is None else stop
        self._prompts = PromptSet(config.tasks, "train", config.seed)
        self._evaluated = state.evaluated
        self.buffer = Buffer(
            state,
            groups_per_update=config.groups_per_update,
            max_staleness=config.max_staleness,
            updates=config.updates,
            policy=config.stale_policy,
            filter_zero_variance=config.filter_zero_variance,
        )
        self._version = state.update
        """Version of the trainer's weights."""
        self._live = state.update
        """Version that every generator has."""
        self._clock = asyncio.get_running_loop().time
        self._busy = BusyTime(config.num_generators, self._clock)
        self._generated = state.tokens.generated
        self._mending = [asyncio.Lock() for _ in range(config.num_generators)]
        self._losses = [0] * config.num_generators
        self._counts: Counter[str] = Counter()

    async def run(self) -> Path:
        """To the last update, or the last before `stop`; the checkpoint at the end.

        Raises `TrainerLost`, `ParityError`, `Diverged`, and `PartLost` for a generator that is lost again and again.
        """
        await self._go_live(await self._publish())
        if self._config.evaluate_every and self._version == 0 and self._evaluated < 0:
            await self._evaluate(0)
        if self._checkpoints.newest() is None:
            await self._save()
        self._busy.shares()
        try:
            async with asyncio.TaskGroup() as tasks:
                askers = [
                    tasks.create_task(self._ask(number))
                    for _ in range(self._config.groups_in_flight)
                    for number in range(self._config.num_generators)
                ]
                await self._train(tasks)
                for asker in askers:
                    asker.cancel()
        except ExceptionGroup as failed:
            # What a lost trainer brings about elsewhere is no reason of its own.
            of_trainer = (error for error in failed.exceptions if isinstance(error, TrainerLost))
            raise next(of_trainer, failed.exceptions[0]) from None
        newest = self._checkpoints.newest()
        assert newest is not None, "the first and the last update have a checkpoint"
        return newest

    async def _ask(self, number: int) -> None:
        """Have one generator sample one group after the other, for as long as the run takes."""
        while True:
            index = await self.buffer.admit()
            generator = self._stack.generators[number]
            request = GroupRequest(
                group_id=group_id(index),
                prompt=self._prompts[index],
                group_size=self._config.group_size,
                seed=self._config.seed,
                settings=self._config.rollout,
            )
            try:
                with self._busy.generator(number), self._watchdog.phase("generate", f"generator {number}"):
                    group = await generator.generate(request)
            except PartLost as lost:
                self.buffer.give_back(index)
                self._counts["sampled_again"] += 1
                await self._replace(number, generator, lost)
            else:
                self._losses[number] = 0
                self.buffer.finish(group)

    async def _train(self, tasks: asyncio.TaskGroup) -> None:
        publication: asyncio.Task[None] | None = None
        checkpoint_s = 0.0
        while self._version < self._config.updates:
            began = self._clock()
            with self._watchdog.phase("wait for groups", *self._generator_names):
                groups = await self._groups()
            if groups is None:
                break
            batch = Batch(update=self._version, version=self._version, groups=groups)
            num_waiting = self.buffer.num_finished
            waited = self._clock()
            metrics = await self._update(batch)
            updated = self._clock()
            if publication is not None:
                await publication
            phases = Phases(
                wait_s=waited - began,
                update_s=updated - waited,
                publish_wait_s=self._clock() - updated,
                checkpoint_s=checkpoint_s,
            )
            published = tasks.create_task(self._publish())
            # The call must be on its way before the next update, so that the trainer copies these weights.
            await asyncio.sleep(0)
            done = _Done(batch, metrics, phases, updated, num_waiting)
            publication = tasks.create_task(self._bring(done, published))
            checkpoint_s = 0.0
            if self._version % self._config.checkpoint_every == 0 or self._version == self._config.updates:
                await publication
                checkpoint_s = self._clock() - updated - phases.publish_wait_s + await self._save()
        if self._version < self._config.updates:
            if publication is not None:
                await publication
            await self._save()

    async def _groups(self) -> tuple[Group, ...] | None:
        """Those of the next update; None, and the groups stay where they are, when the run is to stop."""
        if self._stop.is_set():
            return None
        take, stop = asyncio.create_task(self.buffer.take()), asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((take, stop), return_when=asyncio.FIRST_COMPLETED)
            return take.result() if take.done() else None
        finally:
            take.cancel()
            stop.cancel()

    async def _update(self, batch: Batch) -> TrainMetrics:
        with self._busy.trainer(), self._watchdog.phase("update", "trainer"):
            metrics = await _of_trainer(self._stack.trainer.update(batch))
        self._version += 1
        if not metrics.finite:
            raise Diverged(
                f"update {batch.update}: the loss is `{metrics.loss}` and the gradient's norm "
                f"`{metrics.gradient_norm}`\n\n"
                "hint: lower `learner.learning_rate` or `learner.max_gradient_norm`"
            )
        return metrics

    async def _publish(self) -> Published:
        with self._watchdog.phase("publish", "trainer"):
            return await _of_trainer(self._stack.trainer.publish())

    async def _bring(self, done: "_Done", call: asyncio.Task[Published]) -> None:
        """Bring the weights of an update to the generators, free its places, and write it down."""
        published = await call
        loads = await self._go_live(published)
        self.buffer.release(published.version)
        self._report(self._record(done, published, loads))
        every = self._config.evaluate_every
        if published.version == self._config.updates or (every and published.version % every == 0):
            await self._evaluate(published.version)

    async def _go_live(self, published: Published) -> list[Loaded]:
        """Every generator samples by the weights that were published."""
        loads = await gather(self._load(number, published.version) for number in range(self._config.num_generators))
        self._live = published.version
        return [loaded for loaded in loads if loaded is not None]

    async def _load(self, number: int, version: int) -> Loaded | None:
        """None where the generator was replaced by one that began with these weights."""
        generator = self._stack.generators[number]
        try:
            with self._watchdog.phase("load", f"generator {number}"):
                return await generator.load(version)
        except WeightsLost as lost:
            raise TrainerLost(str(lost)) from lost
        except PartLost as lost:
            await self._replace(number, generator, lost, version)
            return None

    async def _replace(self, number: int, lost: object, error: PartLost, version: int | None = None) -> None:
        """Another generator for one that is lost; whoever comes second finds it there."""
        async with self._mending[number]:
            if self._stack.generators[number] is not lost:
                if version is not None:
                    await self._load(number, version)
                return
            self._losses[number] += 1
            if self._losses[number] > _MOST_LOSSES:
                raise error
            self._counts["replaced"] += 1
            self._report(Notice(event="generator_lost", message=f"generator {number} is lost: {error}"))
            began = self._clock()
            with self._watchdog.phase("replace", f"generator {number}"):
                try:
                    await self._stack.replace_generator(number, self._live if version is None else version)
                except WeightsLost as gone:
                    raise TrainerLost(str(gone)) from gone
            took = f"{self._clock() - began:.1f} s"
            self._report(Notice(event="generator_replaced", message=f"generator {number} is back after {took}"))

    async def _save(self) -> float:
        """A checkpoint of this moment; how long it took, in seconds."""
        began = self._clock()
        state = self.buffer.state(self._evaluated)
        with self._watchdog.phase("checkpoint", "trainer"):
            saved = await _of_trainer(self._checkpoints.save(state, self._stack.trainer))
        self._report(Notice(event="checkpoint", message=str(saved)))
        return self._clock() - began

    async def _evaluate(self, version: int) -> None:
        """Held-out prompts by the weights of `version`, which stay in the generators until it is done."""
        began = self._clock()
        prompts = PromptSet(self._config.tasks, "held_out", self._config.seed)
        numbers = iter(range(self._config.evaluation_prompts))
        found: dict[int, Trajectory] = {}

        async def ask(generator_number: int) -> None:
            for number in numbers:
                request = GroupRequest(
                    group_id=f"held-out-{number}",
                    prompt=prompts[number],
                    group_size=1,
                    seed=self._config.seed,
                    settings=self._config.rollout,
                )
                found[number] = (await self._sample(generator_number, request)).trajectories[0]

        places = range(self._config.groups_in_flight)
        await gather(ask(number) for number in range(self._config.num_generators) for _ in places)
        self._evaluated = version
        report = evaluation_report(
            self._config.model, [found[number] for number in sorted(found)], seeds=[self._config.seed]
        )
        self._report(EvaluationRecord(version=version, duration_s=self._clock() - began, report=report))

    async def _sample(self, number: int, request: GroupRequest) -> Group:
        """One group of an evaluation, by the generator that is in the place by then."""
        while True:
            generator = self._stack.generators[number]
            try:
                with self._busy.generator(number), self._watchdog.phase("evaluate", f"generator {number}"):
                    return await generator.generate(request)
            except PartLost as lost:
                await self._replace(number, generator, lost)

    def _record(self, done: "_Done", published: Published, loads: list[Loaded]) -> UpdateRecord:
        shares = self._busy.shares()
        span_s = shares.duration_s or float("inf")
        tokens = self.buffer.tokens
        generated, self._generated = tokens.generated - self._generated, tokens.generated
        trajectories = done.batch.trajectories
        later = {
            "snapshot_s": published.snapshot_s,
            "push_s": published.push_s,
            "pull_s": max((one.pull_s for one in loads), default=0.0),
            "reload_s": max((one.reload_s for one in loads), default=0.0),
            "pause_s": max((one.pause_s for one in loads), default=0.0),
            "live_s": self._clock() - done.updated,
        }
        return UpdateRecord(
            train=done.metrics,
            phases=done.phases.model_copy(update=later),
            shares=shares,
            samples_per_s=len(trajectories) / span_s,
            trained_tokens_per_s=done.metrics.num_tokens / span_s,
            generated_tokens_per_s=generated / span_s,
            weights_bytes=published.num_bytes,
            parity=max((one.parity for one in loads), default=0.0),
            staleness=done.batch.staleness,
            versions_per_trajectory=sum(len(set(one.versions) - {UNSAMPLED}) for one in trajectories)
            / len(trajectories),
            num_waiting=done.num_waiting,
            num_filtered=self.buffer.num_filtered,
            num_dropped=self.buffer.num_dropped,
            num_sampled_again=self._counts["sampled_again"],
            num_replaced=self._counts["replaced"],
            tokens=tokens,
        )

    @property
    def _generator_names(self) -> list[str]:
        return [f"generator {number}" for number in range(self._config.num_generators)]


async def _of_trainer(call: Awaitable[Result]) -> Result:
    """What the trainer says, its loss told apart from a generator's."""
    try:
        return await call
    except PartLost as lost:
        raise TrainerLost(str(lost)) from lost
