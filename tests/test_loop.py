"""The loop on the scripted stack, in virtual time: modes, overlap, losses of parts, and what is said about it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.config import RunConfig
from rl.ledger import Ledger
from rl.loop import Diverged, TrainerLost
from rl.metrics import METRICS, Notice, RunEvent, UpdateRecord
from rl.stack import GroupRequest, Loaded, ParityError, PartLost
from rl.stacks.scripted import Script, ScriptedGenerator, ScriptedStack, ScriptedTrainer
from rl.train import RunResult, train
from rl.types import Batch, TrainMetrics
from rl.virtual_clock import run_virtually

EVEN = Script(generate_s=lambda request: 1.0, push_s=0.0, load_s=0.0, snapshot_s=0.0, save_s=0.0)


def config(**settings: object) -> RunConfig:
    wanted: dict[str, object] = {
        "stack": "scripted",
        "updates": 12,
        "groups_per_update": 2,
        "group_size": 4,
        "groups_in_flight": 3,
        "checkpoint_every": 4,
        "evaluation_prompts": 3,
        "max_staleness": 1,
    }
    return RunConfig.model_validate({**wanted, **settings})


class Run:
    """One run, with all that it reported and the stack it ran on."""

    def __init__(self, folder: Path, script: Script | None = None, **settings: object) -> None:
        self.config = config(**settings)
        self._folder, self._script = folder, script
        self.events: list[RunEvent] = []
        self.stop: asyncio.Event | None = None
        self.stack: ScriptedStack
        self.result: RunResult

    @property
    def updates(self) -> list[UpdateRecord]:
        return [event for event in self.events if isinstance(event, UpdateRecord)]

    @property
    def notices(self) -> list[str]:
        return [event.event for event in self.events if isinstance(event, Notice) and event.event != "checkpoint"]

    async def go(self, meanwhile: Callable[[ScriptedStack], object] = lambda stack: None) -> float:
        """To the end, in so many virtual seconds; `meanwhile` is done with the open stack."""

        @asynccontextmanager
        async def open_stack(config: RunConfig, folder: str) -> AsyncIterator[ScriptedStack]:
            self.stack = ScriptedStack(config, folder, self._script)
            meanwhile(self.stack)
            yield self.stack

        clock = asyncio.get_running_loop().time
        began = clock()
        self.result = await train(
            self.config,
            str(self._folder),
            resume=True,
            report=self.events.append,
            stop=self.stop,
            open_stack=open_stack,
        )
        return clock() - began


def later(when_s: float, act: Callable[[], object]) -> None:
    asyncio.get_running_loop().call_later(when_s, act)


def test_staleness_zero_is_synchronous(tmp_path: Path) -> None:
    run = Run(tmp_path, EVEN, max_staleness=0, filter_zero_variance=False)
    took_s = run_virtually(run.go())
    assert took_s == pytest.approx(12 * (1 + 1) + 1)
    assert [update.staleness for update in run.updates] == [(0, 0)] * 12
    assert all(update.shares.overlap == 0 for update in run.updates)
    assert run.updates[5].shares.trainer_idle == pytest.approx(0.5)
    assert run.updates[5].shares.generator_idle == pytest.approx(0.5)


def test_asynchronous_overlaps_within_its_bound(tmp_path: Path) -> None:
    run = Run(tmp_path, EVEN, max_staleness=1, filter_zero_variance=False, groups_in_flight=2)
    took_s = run_virtually(run.go())
    assert took_s == pytest.approx(1 + 12 + 2)
    assert max(staleness for update in run.updates for staleness in update.staleness) == 1
    assert run.updates[5].shares.overlap == pytest.approx(1)
    assert run.updates[5].shares.trainer_idle == pytest.approx(0, abs=1e-6)


def test_publication_is_off_the_critical_path(tmp_path: Path) -> None:
    slow = EVEN.model_copy(update={"push_s": 0.5, "load_s": 0.4})
    run = Run(tmp_path, slow, max_staleness=3, filter_zero_variance=False, checkpoint_every=100, groups_in_flight=8)
    took_s = run_virtually(run.go())
    assert took_s == pytest.approx(0.9 + 1 + 12 + 0.9 + 1, abs=0.05)
    record = run.updates[5]
    assert (record.phases.push_s, record.phases.pull_s, record.phases.publish_wait_s) == (0.5, 0.4, 0.0)
    assert record.phases.live_s == pytest.approx(0.9)
    assert max(staleness for update in run.updates for staleness in update.staleness) <= 3


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_the_ledger_depends_on_the_prompts_alone(staleness: int) -> None:
    def ledger(**settings: object) -> Ledger:
        with TemporaryDirectory() as folder:
            run = Run(Path(folder), max_staleness=staleness, **settings)
            run_virtually(run.go())
            return run.result.ledger

    assert ledger(num_generators=1, groups_in_flight=1) == ledger(num_generators=3, groups_in_flight=2)


def test_a_long_tail_is_sampled_over_several_versions(tmp_path: Path) -> None:
    def tail(request: GroupRequest) -> float:
        return 4.0 if int(request.group_id[-1]) == 0 else 0.2

    script = Script(generate_s=tail, update_s=0.3)
    run = Run(tmp_path, script, max_staleness=4, filter_zero_variance=False)
    run_virtually(run.go())
    assert max(update.versions_per_trajectory for update in run.updates) > 1
    assert max(staleness for update in run.updates for staleness in update.staleness) <= 4


def test_drop_leaves_out_what_became_stale(tmp_path: Path) -> None:
    def tail(request: GroupRequest) -> float:
        return 9.0 if int(request.group_id[-1]) == 3 else 0.5

    run = Run(tmp_path, Script(generate_s=tail), stale_policy="drop", filter_zero_variance=False)
    run_virtually(run.go())
    assert run.result.ledger.dropped and run.updates[-1].num_dropped == len(run.result.ledger.dropped)
    tokens = run.result.tokens
    assert tokens.dropped == tokens.wasted == len(run.result.ledger.dropped) * 4 * 8
    assert tokens.generated == tokens.trained + tokens.wasted
    assert max(staleness for update in run.updates for staleness in update.staleness) <= 1


def test_every_update_has_a_line_and_the_trainer_had_every_group_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run_virtually(run.go())
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [line["train"]["update"] for line in lines] == list(range(12))
    assert lines[3] == run.updates[3].model_dump(mode="json")
    assert run.stack.trainer.ledger.trained == run.result.ledger.trained
    assert run.updates[-1].num_filtered == len(run.result.ledger.filtered) > 0


def test_held_out_prompts_are_asked_by_one_version(tmp_path: Path) -> None:
    run = Run(tmp_path, evaluate_every=5)
    run_virtually(run.go())
    found = [event for event in run.events if event.event == "evaluation"]
    assert [event.version for event in found] == [0, 5, 10, 12]
    assert [event.report.version for event in found] == [0, 5, 10, 12]
    assert all(event.report.overall.num_samples == 3 for event in found)
    run_virtually(run.go())
    assert len([event for event in run.events if event.event == "evaluation"]) == 4


def test_a_lost_generator_is_replaced_and_its_groups_are_sampled_again(tmp_path: Path) -> None:
    run = Run(tmp_path, num_generators=2)
    before = Run(tmp_path / "before", num_generators=2)
    run_virtually(before.go())
    run_virtually(run.go(lambda stack: later(0.4, stack.generators[1].lose)))
    assert run.notices == ["generator_lost", "generator_replaced"]
    assert (run.updates[-1].num_replaced, run.updates[-1].num_sampled_again > 0) == (1, True)
    assert run.result.ledger == before.result.ledger
    assert run.result.tokens == before.result.tokens


def test_a_generator_that_is_always_lost_ends_the_run(tmp_path: Path) -> None:
    class Doomed(ScriptedStack):
        async def replace_generator(self, number: int, version: int) -> None:
            await super().replace_generator(number, version)
            self.generators[number].lose()

    @asynccontextmanager
    async def open_stack(config: RunConfig, folder: str) -> AsyncIterator[ScriptedStack]:
        stack = Doomed(config, folder)
        later(3.0, stack.generators[0].lose)
        yield stack

    with pytest.raises(PartLost, match="generator 0 is gone"):
        run_virtually(train(config(), str(tmp_path), open_stack=open_stack))


def test_a_lost_trainer_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    before = Run(tmp_path / "before")
    run_virtually(before.go())
    run = Run(tmp_path / "run")

    def lose_after_seven(stack: ScriptedStack) -> None:
        async def lose() -> None:
            while len(stack.trainer.trained) < 7:
                await asyncio.sleep(0.3)
            stack.trainer.lose()

        run.losing = asyncio.create_task(lose())  # type: ignore[attr-defined]

    run_virtually(run.go(lose_after_seven))
    assert run.notices == ["trainer_lost", "trainer_replaced"]
    assert run.result.ledger == before.result.ledger == Ledger(
        trained=run.stack.trainer.ledger.trained, filtered=before.result.ledger.filtered
    )  # fmt: skip
    numbers = [update.train.update for update in run.updates]
    assert numbers.count(0) == 1 and numbers[-8:] == list(range(4, 12))
    lines = [json.loads(line)["train"]["update"] for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert lines == list(range(12))
    tokens = run.result.tokens
    assert tokens.rolled_back > 0
    assert tokens.generated == tokens.trained + tokens.wasted


def test_a_trainer_that_is_always_lost_ends_the_run(tmp_path: Path) -> None:
    class Doomed(ScriptedStack):
        async def replace_trainer(self, folder: str) -> None:
            await super().replace_trainer(folder)
            self.trainer.lose()

    @asynccontextmanager
    async def open_stack(config: RunConfig, folder: str) -> AsyncIterator[ScriptedStack]:
        stack = Doomed(config, folder)
        later(3.0, stack.trainer.lose)
        yield stack

    with pytest.raises(TrainerLost, match="the trainer is gone"):
        run_virtually(train(config(), str(tmp_path), open_stack=open_stack))


@settings(deadline=None, max_examples=10)
@given(
    st.lists(st.tuples(st.floats(0.01, 60), st.sampled_from(["0", "1", "trainer"])), max_size=3),
    st.sampled_from([0, 2]),
)
def test_losses_at_any_moment_change_no_ledger(losses: list[tuple[float, str]], staleness: int) -> None:
    def run(losses: list[tuple[float, str]]) -> tuple[Run, Ledger]:
        def meanwhile(stack: ScriptedStack) -> None:
            for when_s, part in losses:
                lose = (lambda: stack.trainer.lose()) if part == "trainer" else (lambda n=int(part): lose_one(n))
                later(when_s, lose)

            def lose_one(number: int) -> None:
                stack.generators[number].lose()

        with TemporaryDirectory() as folder:
            done = Run(Path(folder), num_generators=2, max_staleness=staleness, checkpoint_every=3)
            run_virtually(done.go(meanwhile))
        return done, done.stack.trainer.ledger

    quiet, _ = run([])
    disturbed, trained = run(losses)
    assert disturbed.result.ledger == quiet.result.ledger
    assert trained.trained == quiet.result.ledger.trained
    tokens = disturbed.result.tokens
    assert tokens.generated == tokens.trained + tokens.wasted


def test_disagreement_between_trainer_and_engine_ends_the_run(tmp_path: Path) -> None:
    class Stale(ScriptedGenerator):
        async def load(self, version: int) -> Loaded:
            if version == 3:
                raise ParityError("the head is stale")
            return await super().load(version)

    @asynccontextmanager
    async def open_stack(config: RunConfig, folder: str) -> AsyncIterator[ScriptedStack]:
        stack = ScriptedStack(config, folder)
        stack.generators[0].__class__ = Stale
        yield stack

    with pytest.raises(ParityError, match="the head is stale"):
        run_virtually(train(config(), str(tmp_path), open_stack=open_stack))


def test_an_update_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    class Diverging(ScriptedTrainer):
        async def update(self, batch: Batch) -> TrainMetrics:
            metrics = await super().update(batch)
            return metrics.model_copy(update={"loss": float("nan")}) if batch.update == 2 else metrics

    @asynccontextmanager
    async def open_stack(config: RunConfig, folder: str) -> AsyncIterator[ScriptedStack]:
        stack = ScriptedStack(config, folder)
        stack.trainer.__class__ = Diverging
        yield stack

    with pytest.raises(Diverged, match="update 2: the loss is `nan`"):
        run_virtually(train(config(), str(tmp_path), open_stack=open_stack))


def test_a_run_that_is_told_to_stop_goes_on_later_with_the_same_ledger(tmp_path: Path) -> None:
    whole, halves = Run(tmp_path / "whole"), Run(tmp_path / "halves")
    run_virtually(whole.go())

    async def first_half() -> None:
        halves.stop = asyncio.Event()
        later(9.3, halves.stop.set)
        await halves.go()

    run_virtually(first_half())
    assert 0 < halves.result.updates < 12
    assert len(halves.updates) == halves.result.updates
    halves.stop = None
    run_virtually(halves.go())
    assert [update.train.update for update in halves.updates] == list(range(12))
    assert halves.result.ledger == whole.result.ledger


def test_a_stuck_phase_is_reported_and_waited_for(tmp_path: Path) -> None:
    def slow(request: GroupRequest) -> float:
        return 500.0 if request.group_id == "00000005" else 1.0

    run = Run(tmp_path, EVEN.model_copy(update={"generate_s": slow}), stuck_after_s=100)
    run_virtually(run.go())
    assert run.result.updates == 12
    said = [event.message for event in run.events if isinstance(event, Notice) and event.event == "stuck"]
    assert any("phase `generate` (waiting for generator 0) is not done after 100 s" in message for message in said)
    assert any("phase `wait for groups`" in message for message in said)
    assert all(Path(message.rsplit("`", 2)[1]).stat().st_size > 0 for message in said)
