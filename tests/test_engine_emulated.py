"""The emulated engine: on virtual time, against a device that is stepped one by one."""

import asyncio
import math
from collections.abc import Coroutine
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.config import EngineConfig, RunConfig
from rl.emulation import EngineEmulation
from rl.engine import EngineClosed, open_engine
from rl.engine_emulated import EmulatedEngine
from rl.gather import gather
from rl.generate import GenerateRequest, Sample
from rl.tokenizer import TinyTokenizer
from rl.virtual_clock import run_virtually

PLAIN = EngineEmulation(prefill_s_per_token=0.0, decode_s=1.0, decode_s_per_sequence=0.0, reload_s_per_gb=0.0)
GIGABYTE = {"weights": torch.zeros(1, dtype=torch.uint8).expand(10**9)}


def request(length: int, prompt: tuple[int, ...] = (20, 21), seed: int = 0, whole: bool = True) -> GenerateRequest:
    return GenerateRequest(
        token_ids=prompt, max_tokens=length, temperature=1, seed=seed, stop_pattern="never", to_the_end=whole
    )


async def opened(emulation: EngineEmulation = PLAIN, **config: Any) -> EmulatedEngine:
    engine = await open_engine(
        EngineConfig(name="emulated", emulation=emulation, **config), "", TinyTokenizer(), version=3
    )
    assert isinstance(engine, EmulatedEngine)
    return engine


async def later(after_s: float, work: Coroutine[Any, Any, Any]) -> tuple[float, Any]:
    """When it was done, and what came of it."""
    await asyncio.sleep(after_s)
    result = await work
    return asyncio.get_running_loop().time(), result


def test_a_step_gives_a_token_to_all_that_run() -> None:
    async def run() -> list[tuple[float, Sample]]:
        engine = await opened(PLAIN.model_copy(update={"decode_s_per_sequence": 0.5}))
        return await gather(later(0, engine(request(length))) for length in (2, 4, 4))

    first, second, third = run_virtually(run())
    assert [len(sample.token_ids) for _, sample in (first, second, third)] == [2, 4, 4]
    assert first[0] == pytest.approx(2 * 2.0)
    assert second[0] == third[0] == pytest.approx(2 * 2.0 + 2 * 1.5)


def test_newcomers_begin_at_the_next_boundary_and_their_prompts_are_read_first() -> None:
    async def run() -> list[tuple[float, Sample]]:
        engine = await opened(PLAIN.model_copy(update={"prefill_s_per_token": 0.1}))
        twins = [later(2.5, engine(request(3, (20, 21, 22, 23)))) for _ in range(2)]
        return await gather([later(0, engine(request(6))), *twins])

    first, second, third = run_virtually(run())
    begin = 0.2 + 3 + 0.4
    assert second[0] == third[0] == pytest.approx(begin + 3)
    assert first[0] == pytest.approx(begin + 3)


@pytest.mark.parametrize(("policy", "again_s"), [("keep", 0.0), ("recompute", 0.1 * (2 + 3))])
def test_weights_change_between_two_steps(policy: str, again_s: float) -> None:
    async def run() -> list[tuple[float, Any]]:
        engine = await opened(
            PLAIN.model_copy(update={"prefill_s_per_token": 0.1, "reload_s_per_gb": 5.0}), kv_policy=policy
        )
        return await gather([later(0, engine(request(5))), later(2.7, engine.swap(GIGABYTE, 4))])

    (ended, sample), (swapped_at, swapped) = run_virtually(run())
    assert sample.versions == (3, 3, 3, 4, 4)
    assert swapped.pause_s == swapped.reload_s == pytest.approx(5 + again_s)
    assert swapped_at == pytest.approx(0.2 + 3 + 5 + again_s)
    assert ended == pytest.approx(swapped_at + 2)


def test_an_idle_engine_has_no_pause_and_takes_no_request_while_it_loads() -> None:
    async def run() -> list[tuple[float, Any]]:
        engine = await opened(PLAIN.model_copy(update={"reload_s_per_gb": 5.0}))
        return await gather([later(1, engine.swap(GIGABYTE, 4)), later(2, engine(request(3)))])

    (swapped_at, swapped), (ended, sample) = run_virtually(run())
    assert swapped_at == pytest.approx(6)
    assert (swapped.pause_s, swapped.reload_s) == (0, 5)
    assert ended == pytest.approx(9)
    assert sample.versions == (4, 4, 4)


def test_log_probabilities_are_those_of_an_even_choice() -> None:
    async def run() -> list[Sample]:
        engine = await opened()
        return await engine.submit([request(500, seed=seed) for seed in (1, 1, 2)])

    one, same, other = run_virtually(run())
    assert one == same
    assert one.token_ids != other.token_ids
    assert all(math.exp(-logprob) == pytest.approx(len(TinyTokenizer()) - 16) for logprob in one.logprobs)
    assert TinyTokenizer.eos_token_id not in one.token_ids


def test_turns_that_may_end_have_long_tailed_lengths() -> None:
    async def run() -> list[Sample]:
        engine = await opened(PLAIN.model_copy(update={"median_tokens": 30.0, "sigma": 0.8}))
        return await engine.submit([request(100, seed=seed, whole=False) for seed in range(400)])

    samples = run_virtually(run())
    lengths = sorted(len(sample.token_ids) for sample in samples)
    assert 24 < lengths[200] < 36
    assert lengths[-1] == 100
    assert {sample.finish for sample in samples if len(sample.token_ids) == 100} == {"length"}
    assert {sample.finish for sample in samples if len(sample.token_ids) < 100} == {"stop"}


def test_who_gives_up_makes_room_and_who_is_left_is_answered() -> None:
    async def run() -> tuple[list[tuple[float, Sample]], int]:
        engine = await opened(PLAIN.model_copy(update={"decode_s_per_sequence": 1.0}))
        leaving = asyncio.create_task(engine(request(100)))
        asyncio.get_running_loop().call_later(4.5, leaving.cancel)
        staying = asyncio.create_task(later(0, engine(request(4))))
        cut = asyncio.create_task(later(6.5, engine(request(100))))
        done = await staying
        await asyncio.sleep(3.6)
        await engine.close()
        with pytest.raises(EngineClosed):
            await engine(request(1))
        return [done, await cut], engine.version

    ((staying_at, staying), (_, cut)), _ = run_virtually(run())
    assert len(staying.token_ids) == 4
    assert staying_at < 8
    assert cut.finish == "abort"
    assert 0 < len(cut.token_ids) < 100


def test_what_it_cannot_do_is_refused() -> None:
    async def run() -> None:
        engine = await opened(max_model_tokens=16)
        with pytest.raises(ValueError, match="no room in an engine of 16"):
            await engine(request(4, tuple(range(16, 33))))
        with pytest.raises(ValueError, match="has no weights"):
            await engine.score((1, 2))

    run_virtually(run())


@pytest.mark.parametrize(
    "settings",
    [
        {"engine": {"name": "emulated"}},
        {"engine": {"emulation": {}}},
        {"engine": {"name": "emulated", "emulation": {}}},
        {"learner": {"emulation": {}}},
    ],
)
def test_emulation_is_whole_or_not_at_all(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="belong together"):
        RunConfig.model_validate(settings)


Arrivals = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(Arrivals, st.lists(st.integers(0, 40), max_size=3))
def test_any_schedule_is_that_of_a_device_stepped_one_by_one(quarters: list[tuple[int, int]], swaps: list[int]) -> None:
    """Times are such that nothing comes just when something else happens."""
    arrivals = sorted((at / 4 + number / 97, length) for number, (at, length) in enumerate(quarters))
    emulation = PLAIN.model_copy(update={"decode_s_per_sequence": 0.25, "reload_s_per_gb": 1.5 + 1 / 31})
    changes = [at / 4 + 1 / 17 + number / 89 for number, at in enumerate(sorted(swaps))]

    async def run() -> list[tuple[float, Any]]:
        engine = await opened(emulation)
        turns = [later(at, engine(request(length))) for at, length in arrivals]
        loads = [later(at, engine.swap(GIGABYTE, 4 + number)) for number, at in enumerate(changes)]
        return await gather([*turns, *loads])

    found = run_virtually(run())
    expected = _stepped(emulation, arrivals, changes)
    for (found_at, sample), (at, versions) in zip(found, expected, strict=False):
        assert found_at == pytest.approx(at)
        assert sample.versions == tuple(versions)


def _stepped(
    emulation: EngineEmulation, arrivals: list[tuple[float, int]], changes: list[float]
) -> list[tuple[float, list[int]]]:
    ends: list[float] = [math.inf] * len(arrivals)
    versions: list[list[int]] = [[] for _ in arrivals]
    waiting, loads, running = list(range(len(arrivals))), list(changes), list[int]()
    now, version = 0.0, 3
    while waiting or running:
        if not running:
            upcoming = [arrivals[waiting[0]][0], *loads[:1]]
            now = max(now, min(upcoming))
        late = [one for one in waiting if arrivals[one][0] <= now + 1e-9]
        begun = [at for at in loads if at <= now + 1e-9]
        now += emulation.reload_s_per_gb * len(begun)
        version += len(begun)
        waiting, loads, running = waiting[len(late) :], loads[len(begun) :], running + late
        if not running:
            continue
        now += emulation.step_s(len(running))
        for one in running:
            versions[one].append(version)
            if len(versions[one]) == arrivals[one][1]:
                ends[one] = now
        running = [one for one in running if ends[one] == math.inf]
    return list(zip(ends, versions, strict=True))
