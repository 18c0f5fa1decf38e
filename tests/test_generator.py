"""A generator with vLLM behind it: groups, weights from a store, and a probe that lets nothing stale pass."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from rl.config import EngineConfig, EngineName, RunConfig
from rl.engine import Engine
from rl.engine_environment import set_engine_environment
from rl.generator import GeneratorHost
from rl.prompts import PromptSet
from rl.rollout import RolloutSettings
from rl.stack import GroupRequest, ParityError, PartLost
from rl.tokenizer import TinyTokenizer
from rl.types import Task

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]
TOKENIZER = TinyTokenizer()
SETTINGS = RolloutSettings(prompt_style="brief", max_tokens=200, max_tokens_per_turn=24)
PROMPTS = PromptSet([Task(name="simple")], "train", 0)


def _config(name: EngineName = "vllm", **settings: Any) -> RunConfig:
    engine = EngineConfig(name=name, cache_gb=0.05, max_model_tokens=256, **settings)
    return RunConfig(engine=engine, rollout=SETTINGS)


def _request(number: int, group_size: int = 4) -> GroupRequest:
    return GroupRequest(group_id=f"g{number}", prompt=PROMPTS[number], group_size=group_size, seed=7, settings=SETTINGS)


class Store:
    """A trainer's side: two models of one shape, published by version."""

    def __init__(self, folder: Path) -> None:
        from rl.models import save_model
        from rl.tiny import new_tiny
        from rl.weights import Manifest, WeightStoreHandle, open_writer

        self.models: list[Any] = [new_tiny(seed).eval() for seed in (0, 1)]
        self.folder = str(folder / "model")
        save_model(self.models[0], TOKENIZER, self.folder)
        (folder / "weights").mkdir()
        self.handle = WeightStoreHandle(transport="file", place=str(folder / "weights"))
        self._writer = open_writer(self.handle, Manifest.of(self.models[0].state_dict()))

    async def publish(self, version: int, model: int, probe_of: int | None = None) -> None:
        """The weights of a model, with what it says of the probe; or with what another one says."""
        import torch

        from rl.weights import Header, probe_tokens

        tokens = torch.tensor(probe_tokens(TOKENIZER))
        with torch.inference_mode():
            logits = self.models[model if probe_of is None else probe_of](input_ids=tokens[None]).logits[0, :-1]
        probe = torch.log_softmax(logits, -1).gather(-1, tokens[1:, None])[:, 0]
        self._writer.snapshot(Header(version=version, probe=tuple(probe.tolist())), self.models[model].state_dict())
        await self._writer.push()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    set_engine_environment(_config().engine)
    return Store(tmp_path_factory.mktemp("store"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def generator(store: Store) -> AsyncIterator[GeneratorHost]:
    host = GeneratorHost(_config(), 0, store.folder, store.handle)
    await host.open()
    yield host
    await host.close()


async def test_groups_are_sampled_together_each_whole(generator: GeneratorHost) -> None:
    groups = await asyncio.gather(*(generator.generate(_request(number)) for number in range(3)))
    assert [group.id for group in groups] == ["g0", "g1", "g2"]
    assert all([trajectory.sample for trajectory in group.trajectories] == [0, 1, 2, 3] for group in groups)
    assert all(group.num_sampled > 0 for group in groups)


async def test_weights_arrive_and_are_the_trainers(generator: GeneratorHost, store: Store) -> None:
    await store.publish(5, model=1)
    running = asyncio.ensure_future(generator.generate(_request(3)))
    loaded = await generator.load(5)
    await running
    assert loaded.version == 5
    assert loaded.parity < 1e-4
    assert loaded.num_bytes > 4_000_000
    assert loaded.pull_s > 0 and loaded.reload_s > 0
    group = await generator.generate(_request(4))
    assert {version for one in group.trajectories for version in one.versions} == {-1, 5}


async def test_weights_that_are_not_the_trainers_stop_the_run(generator: GeneratorHost, store: Store) -> None:
    await store.publish(6, model=0, probe_of=1)
    with pytest.raises(ParityError, match=r"version 6.*\n.*fixed tokens: [0-9.]+\n.*afterwards, 8 tokens"):
        await generator.load(6)
    await store.publish(7, model=0)
    assert (await generator.load(7)).version == 7


async def test_a_head_that_stays_on_old_weights_is_caught(store: Store) -> None:
    from rl.engine_thread import EngineThread
    from rl.engine_vllm import VllmDriver
    from rl.parity import check_parity
    from rl.weights import Header, probe_tokens

    class Forgetful(VllmDriver):
        """Reloads as vLLM does it by itself."""

        @staticmethod
        def repack(model: Any) -> None:
            pass

    config = _config().engine
    engine: Engine = await EngineThread.open(
        lambda deliver: Forgetful(config, store.folder, TOKENIZER, deliver), "forgetful"
    )
    try:
        import torch

        tokens = torch.tensor(probe_tokens(TOKENIZER))
        model = store.models[1]
        with torch.inference_mode():
            logprobs = torch.log_softmax(model(input_ids=tokens[None]).logits[0, :-1], -1)
        probe = tuple(logprobs.gather(-1, tokens[1:, None])[:, 0].tolist())
        await engine.swap({name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}, 1)
        with pytest.raises(ParityError, match=r"fixed tokens: [0-9]\.[0-9]+\n"):
            await check_parity(engine, Header(version=1, probe=probe), TOKENIZER, 1e-4)
    finally:
        await engine.close()


@pytest.mark.parametrize("name", ["hf", "vllm"])
async def test_reproducible_groups_are_the_same_to_the_bit_whatever_else_runs(name: EngineName, store: Store) -> None:
    host = GeneratorHost(_config(name, reproducible=True), 1, store.folder)
    await host.open(version=3)
    try:
        alone = await host.generate(_request(2))
        groups = await asyncio.gather(*(host.generate(_request(number)) for number in (5, 0, 2, 1)))
    finally:
        await host.close()
    assert groups[2] == alone
    assert {version for one in alone.trajectories for version in one.versions} == {-1, 3}


async def test_a_generator_that_starts_late_has_the_weights_of_its_time(store: Store) -> None:
    await store.publish(9, model=1)
    host = GeneratorHost(_config("hf"), 2, store.folder, store.handle)
    await host.open(version=9)
    group = await host.generate(_request(0, group_size=1))
    assert group.oldest_version == 9
    await host.close()
    with pytest.raises(PartLost, match="generator 2: `engine-hf` is closed"):
        await host.generate(_request(0))


async def test_a_pull_that_is_overtaken_is_tried_again(store: Store, tmp_path: Path) -> None:
    from rl.weights import Header, Pulled, TornRead

    class Overtaken(Pulled):
        """Torn, so often."""

        times = 2

        def check(self) -> None:
            if Overtaken.times:
                Overtaken.times -= 1
                raise TornRead("overtaken")

    class Reader:
        """Of one version."""

        async def pull(self, version: int) -> Pulled:
            return Overtaken(Header(version=version), store.models[0].state_dict(), 4)

    host = GeneratorHost(_config("hf"), 3, store.folder, store.handle)
    host._reader = Reader()  # type: ignore[assignment]
    header, _ = await host._pull(4)
    assert header.version == 4
    Overtaken.times = 100
    with pytest.raises(TornRead):
        await host._pull(4)
