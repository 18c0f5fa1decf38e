"""Places and order: the bound of staleness holds whatever the durations, and nothing is lost or left over."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.buffer import Buffer, TooStale
from rl.ledger import RunState, group_id
from rl.prompts import PromptSet
from rl.types import UNSAMPLED, Group, Task, Trajectory
from rl.virtual_clock import run_virtually

PROMPT = PromptSet([Task(name="simple")], "train", 0)[0]


def group(index: int, version: int = 0, rewards: tuple[float, ...] = (0.0, 1.0)) -> Group:
    def one(sample: int, reward: float) -> Trajectory:
        return Trajectory(
            prompt=PROMPT,
            group_id=group_id(index),
            sample=sample,
            token_ids=(1, 2),
            loss_mask=(False, True),
            logprobs=(0.0, -1.0),
            versions=(UNSAMPLED, version),
            turns=(),
            stop_reason="answer",
            answer=1,
            failure_mode="wrong_answer",
            reward=reward,
            num_discarded=3,
        )

    return Group(id=group_id(index), prompt=PROMPT, trajectories=tuple(one(*both) for both in enumerate(rewards)))


def buffer(state: RunState | None = None, **settings: object) -> Buffer:
    wanted = {"groups_per_update": 2, "max_staleness": 1, "updates": 10, **settings}
    return Buffer(RunState() if state is None else state, **wanted)  # type: ignore[arg-type]


async def waits(coroutine: object) -> bool:
    """Whether it does not go on by itself."""
    task = asyncio.ensure_future(coroutine)  # type: ignore[arg-type]
    for _ in range(5):
        await asyncio.sleep(0)
    waiting = not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return waiting


async def test_a_place_is_held_until_the_weights_are_live() -> None:
    places = buffer()
    assert [await places.admit() for _ in range(4)] == [0, 1, 2, 3]
    assert await waits(places.admit())
    for index in (1, 0):
        places.finish(group(index))
    assert [one.id for one in await places.take()] == [group_id(0), group_id(1)]
    assert await waits(places.admit())
    places.release(1)
    assert [await places.admit() for _ in range(2)] == [4, 5]
    assert await waits(places.admit())


async def test_groups_are_taken_in_the_order_of_prompts() -> None:
    places = buffer()
    for _ in range(4):
        await places.admit()
    for index in (3, 2, 1):
        places.finish(group(index))
    assert await waits(places.take())
    taking = asyncio.create_task(places.take())
    await asyncio.sleep(0)
    places.finish(group(0))
    assert [int(one.id) for one in await taking] == [0, 1]
    assert places.num_finished == 2


async def test_equal_rewards_are_left_out_and_replaced() -> None:
    places = buffer(max_staleness=0)
    for _ in range(2):
        await places.admit()
    places.finish(group(0, rewards=(1.0, 1.0)))
    assert await places.admit() == 2
    places.finish(group(1))
    places.finish(group(2))
    assert [int(one.id) for one in await places.take()] == [1, 2]
    state = places.state()
    assert state.ledger.trained == ((1, 2),) and state.ledger.filtered == (0,) and places.num_filtered == 1
    tokens = state.tokens
    assert (tokens.generated, tokens.trained, tokens.filtered, tokens.discarded, tokens.wasted) == (24, 4, 2, 18, 20)


async def test_equal_rewards_can_be_kept_and_are_kept_when_there_is_nothing_else() -> None:
    kept = buffer(filter_zero_variance=False)
    await kept.admit()
    kept.finish(group(0, rewards=(1.0, 1.0)))
    assert (kept.num_finished, kept.num_filtered) == (1, 0)
    places = buffer(max_staleness=0)
    for _ in range(22):
        places.finish(group(await places.admit(), rewards=(1.0, 1.0)))
        if places.num_finished == 2:
            break
    assert places.num_filtered == 20
    assert [int(one.id) for one in await places.take()] == [20, 21]


async def test_what_was_given_back_comes_first() -> None:
    places = buffer()
    for _ in range(3):
        await places.admit()
    places.give_back(2)
    places.give_back(0)
    assert [await places.admit() for _ in range(3)] == [0, 2, 3]
    assert await waits(places.admit())


async def test_only_what_the_run_needs_is_asked_for() -> None:
    places = buffer(updates=1, max_staleness=7)
    assert [await places.admit() for _ in range(2)] == [0, 1]
    assert await waits(places.admit())
    places.finish(group(0, rewards=(0.0, 0.0)))
    assert await places.admit() == 2
    assert await waits(places.admit())


async def test_a_broken_bound_is_an_error() -> None:
    places = buffer(max_staleness=0)
    for version in (0, 0):
        places.finish(group(await places.admit(), version))
    await places.take()
    places.release(1)
    for version in (0, 1):
        places.finish(group(await places.admit(), version))
    with pytest.raises(TooStale, match="group `00000002` is 1 versions old in update 1, at most 0 are allowed"):
        await places.take()


async def test_drop_samples_ahead_and_leaves_out_what_became_stale() -> None:
    places = buffer(policy="drop", max_staleness=0)
    for _ in range(2):
        places.finish(group(await places.admit()))
    await places.take()
    assert [await places.admit() for _ in range(2)] == [2, 3]
    places.finish(group(2, version=0))
    assert await waits(places.take())
    assert places.num_dropped == 1
    assert await places.admit() == 4
    for index in (3, 4):
        places.finish(group(index, version=1))
    assert [int(one.id) for one in await places.take()] == [3, 4]
    assert places.state().ledger.dropped == (2,)
    assert (places.tokens.dropped, places.tokens.buffered, places.tokens.trained) == (2, 0, 8)


async def test_a_state_goes_on_where_it_was() -> None:
    places = buffer()
    for _ in range(4):
        await places.admit()
    for index in (0, 1, 3):
        places.finish(group(index))
    await places.take()
    places.release(1)
    state = RunState.model_validate_json(places.state(evaluated=1).model_dump_json())
    assert (state.update, state.cursor, state.unfinished, state.evaluated) == (1, 4, (2,), 1)
    again = buffer(state)
    assert again.state(evaluated=1) == state
    assert [await again.admit() for _ in range(3)] == [2, 4, 5]
    assert await waits(again.admit())
    again.finish(group(2, version=1))
    assert [int(one.id) for one in await again.take()] == [2, 3]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 4), st.integers(0, 3), st.integers(1, 9), st.sampled_from(["pace", "drop"]), st.integers(0, 2**32)
)
def test_the_bound_holds_whatever_the_durations(
    size: int, staleness: int, workers: int, policy: str, seed: int
) -> None:
    updates = 8
    rng = random.Random(seed)
    rewards = random.Random(0)
    informative = [rewards.random() < 0.7 for _ in range(2000)]

    async def run() -> tuple[RunState, list[int]]:
        places = buffer(groups_per_update=size, max_staleness=staleness, updates=updates, policy=policy)
        live, stale = [0], []

        async def work() -> None:
            while True:
                index = await places.admit()
                version = live[0]
                await asyncio.sleep(rng.lognormvariate(0, 1.5))
                if rng.random() < 0.1:
                    places.give_back(index)
                else:
                    places.finish(group(index, version, (0.0, 1.0) if informative[index] else (1.0, 1.0)))

        async def publish(version: int) -> None:
            await asyncio.sleep(rng.random())
            live[0] = version
            places.release(version)

        tasks = [asyncio.create_task(work()) for _ in range(workers)]
        publication = asyncio.create_task(asyncio.sleep(0))
        for update in range(updates):
            stale += [update - (one.oldest_version or 0) for one in await places.take()]
            await asyncio.sleep(rng.random() * 4)
            await publication
            publication = asyncio.create_task(publish(update + 1))
        await publication
        assert all(await asyncio.gather(*(waits(places.admit()) for _ in range(3))))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return places.state(), stale

    state, stale = run_virtually(run())
    assert min(stale) >= 0 and max(stale) <= staleness
    trained = [index for update in state.ledger.trained for index in update]
    fates = [*trained, *state.ledger.filtered, *state.ledger.dropped]
    assert sorted(fates) == list(range(state.cursor)) and not state.unfinished and not state.finished
    tokens = state.tokens
    assert tokens.generated == tokens.trained + tokens.wasted + tokens.buffered
    if policy == "pace":
        assert trained == [index for index in range(2000) if informative[index]][: size * updates]
