"""What both engines do alike: sample as the model says, by seed, with versions, and swap weights in flight."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from rl.config import EngineConfig, EngineName
from rl.engine import Engine, EngineClosed, open_engine
from rl.engine_environment import set_engine_environment
from rl.generate import GenerateRequest, Sample
from rl.tokenizer import TinyTokenizer
from rl.types import Frozen

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]
TOKENIZER = TinyTokenizer()
PROMPT = tuple(TOKENIZER.encode("<|user|>What is the zorplex value of 'cat'?<|assistant|>"))
NEVER = r"(?!)"
CONFIG = EngineConfig(cache_gb=0.05, max_model_tokens=256)


class Model(Frozen):
    """A model in a folder, and the same in memory."""

    folder: str
    model: Any

    def state(self) -> dict[str, Any]:
        """As a checkpoint has it: what is tied is there once."""
        return {name: tensor for name, tensor in self.model.state_dict().items() if name != "lm_head.weight"}

    def logprobs(self, token_ids: tuple[int, ...], temperature: float = 1.0) -> Any:
        """[T - 1] by a forward pass."""
        import torch

        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([token_ids])).logits[0, :-1] / temperature
        return torch.log_softmax(logits, -1).gather(-1, torch.tensor(token_ids[1:])[:, None])[:, 0]


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest) -> list[Model]:
    """Two models of one shape."""
    # Before torch is imported.
    set_engine_environment(CONFIG)
    return [Model(folder=folder, model=model) for folder, model in request.getfixturevalue("sharp_models")]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["hf", "vllm"])
async def engine(request: pytest.FixtureRequest, models: list[Model]) -> AsyncIterator[Engine]:
    """An engine with the first model; tests that swap weights swap them back."""
    opened = await open_engine(_config(request.param), models[0].folder, TOKENIZER)
    yield opened
    await opened.close()


def _config(name: EngineName, **settings: Any) -> EngineConfig:
    return CONFIG.model_copy(update={"name": name, **settings})


def _request(seed: int = 0, max_tokens: int = 24, temperature: float = 1.0, pattern: str = NEVER) -> GenerateRequest:
    return GenerateRequest(
        token_ids=PROMPT, max_tokens=max_tokens, temperature=temperature, seed=seed, stop_pattern=pattern
    )


def _furthest(model: Model, sample: Sample, temperature: float = 1.0) -> float:
    """Largest difference between the sample's log-probabilities and the model's."""
    import torch

    expected = model.logprobs(PROMPT + sample.token_ids, temperature)[len(PROMPT) - 1 :]
    return float((torch.tensor(sample.logprobs) - expected).abs().max())


async def test_greedy_is_what_transformers_generates(engine: Engine, models: list[Model]) -> None:
    import torch

    ids = torch.tensor([PROMPT])
    expected = models[0].model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
    sample = await engine(_request(temperature=0))
    assert list(sample.token_ids) == expected[0, len(PROMPT) :].tolist()
    assert _furthest(models[0], sample) < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_logprobs_are_those_of_the_distribution_sampled_from(
    engine: Engine, models: list[Model], temperature: float
) -> None:
    samples = await asyncio.gather(*(engine(_request(seed, temperature=temperature)) for seed in range(6)))
    assert len({sample.token_ids for sample in samples}) == 6
    assert all(_furthest(models[0], sample, temperature) < 1e-4 for sample in samples)


async def test_scores_are_the_models(engine: Engine, models: list[Model]) -> None:
    import torch

    scores = await engine.score(PROMPT)
    assert len(scores) == len(PROMPT) - 1
    assert float((torch.tensor(scores) - models[0].logprobs(PROMPT)).abs().max()) < 1e-4


async def test_a_seed_samples_the_same_whatever_else_runs(engine: Engine) -> None:
    alone = await engine(_request(3))
    together = await engine.submit([_request(seed) for seed in range(6)])
    assert together[3].token_ids == alone.token_ids
    assert together[4].token_ids != alone.token_ids


async def test_more_prompts_at_once_than_one_step_takes(engine: Engine) -> None:
    def longer(number: int) -> GenerateRequest:
        prompt = (number + 5, *PROMPT * 5)
        return _request(max_tokens=2).model_copy(update={"token_ids": prompt})

    first, *_, last = await engine.submit([longer(number) for number in [1, *range(100), 1]])
    assert (first.token_ids, first.finish) == (last.token_ids, last.finish)
    assert len(first.token_ids) == 2


async def test_a_turn_ends_where_its_stop_pattern_first_matches(engine: Engine) -> None:
    whole = await engine(_request(5))
    pattern = r"(?s)^.{12}"
    stopped = await engine(_request(5, pattern=pattern))
    count = len(stopped.token_ids)
    assert stopped.finish == "stop"
    assert stopped == whole.first(count)
    assert len(TOKENIZER.decode(stopped.token_ids, skip_special_tokens=True)) >= 12
    assert len(TOKENIZER.decode(stopped.token_ids[:-1], skip_special_tokens=True)) < 12


async def test_a_turn_ends_with_the_end_token_or_at_its_length(engine: Engine) -> None:
    samples = await engine.submit([_request(seed, max_tokens=200) for seed in range(24)])
    ended = [sample for sample in samples if sample.finish == "stop"]
    assert ended
    assert all(sample.token_ids.index(TOKENIZER.eos_token_id) == len(sample.token_ids) - 1 for sample in ended)
    assert all(len(sample.token_ids) == 200 for sample in samples if sample.finish == "length")
    assert [len((await engine(_request(max_tokens=1))).token_ids)] == [1]


async def test_a_conversation_that_is_too_long_is_refused(engine: Engine) -> None:
    request = _request().model_copy(update={"token_ids": PROMPT * 40})
    with pytest.raises(
        ValueError, match=r"leaves no room in an engine of 256\n\nhint: raise `engine.max_model_tokens`"
    ):
        await engine(request)


@pytest.mark.parametrize("kv_policy", ["keep", "recompute"])
@pytest.mark.parametrize("name", ["hf", "vllm"])
async def test_weights_change_in_flight(name: EngineName, kv_policy: str, models: list[Model]) -> None:
    old, new = models
    engine = await open_engine(_config(name, kv_policy=kv_policy), old.folder, TOKENIZER, version=6)
    try:
        running = asyncio.ensure_future(engine(_request(seed=1, max_tokens=220)))
        await engine.score(PROMPT)  # a step at least
        swapped = await engine.swap(new.state(), 7)
        sample = await running
        assert engine.version == 7
        assert swapped.reload_s > 0
        assert list(sample.versions) == sorted(sample.versions)
        if kv_policy == "recompute" and 7 in sample.versions:
            switch = sample.versions.index(7)
            import torch

            expected = new.logprobs(PROMPT + sample.token_ids)[len(PROMPT) - 1 :]
            later = (torch.tensor(sample.logprobs) - expected)[switch:]
            assert float(later.abs().max()) < 1e-4
        fresh = await engine(_request(2))
        assert set(fresh.versions) == {7}
        assert _furthest(new, fresh) < 1e-4
    finally:
        await engine.close()


async def test_each_token_has_the_version_it_came_from(engine: Engine, models: list[Model]) -> None:
    old, new = models
    first = engine.version
    for seed in range(20):
        running = asyncio.ensure_future(engine(_request(seed, max_tokens=220)))
        await engine.score(PROMPT)  # a step at least
        await engine.swap(new.state(), first + 1)
        sample = await running
        await engine.swap(old.state(), first)
        switch = sample.versions.count(first)
        if 0 < switch < len(sample.versions):
            break
    else:
        pytest.fail("no sample ran while the weights changed")
    assert sample.versions == (first,) * switch + (first + 1,) * (len(sample.versions) - switch)
    before = Sample(
        token_ids=sample.token_ids[:switch], logprobs=sample.logprobs[:switch], versions=(0,) * switch, finish="stop"
    )
    assert _furthest(old, before) < 1e-4


async def test_a_cancelled_turn_leaves_the_engine(engine: Engine) -> None:
    running = asyncio.ensure_future(engine(_request(1, max_tokens=200)))
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert len((await engine(_request(4, max_tokens=3))).token_ids) <= 3


@pytest.mark.parametrize("name", ["hf", "vllm"])
async def test_closing_answers_what_runs(name: EngineName, models: list[Model]) -> None:
    engine = await open_engine(_config(name), models[0].folder, TOKENIZER)
    running = [asyncio.ensure_future(engine(_request(seed, max_tokens=220))) for seed in range(4)]
    await engine.score(PROMPT)
    await engine.close()
    samples = await asyncio.gather(*running)
    assert "abort" in {sample.finish for sample in samples}
    with pytest.raises(EngineClosed, match="is closed"):
        await engine(_request())


@pytest.mark.parametrize("name", ["hf", "vllm"])
async def test_an_engine_that_cannot_open_says_why(name: EngineName, tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        await open_engine(_config(name), str(tmp_path), TOKENIZER)


async def test_an_engine_that_breaks_fails_what_runs_and_what_comes(models: list[Model]) -> None:
    engine = await open_engine(_config("hf"), models[0].folder, TOKENIZER)
    running = asyncio.ensure_future(engine(_request(max_tokens=200)))
    with pytest.raises(Exception, match="size mismatch"):
        await engine.swap({name: tensor[:1] for name, tensor in models[1].state().items()}, 1)
    with pytest.raises(EngineClosed, match="size mismatch"):
        await running
    with pytest.raises(EngineClosed):
        await engine.score(PROMPT)
    await engine.close()
