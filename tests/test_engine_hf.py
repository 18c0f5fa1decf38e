"""The Hugging Face driver alone: rows that come and go while a batch runs, and the sampler."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rl.config import EngineConfig
from rl.engine import ScoreRequest
from rl.engine_thread import Answer, Request
from rl.generate import GenerateRequest, Sample
from rl.tokenizer import TinyTokenizer

TOKENIZER = TinyTokenizer()
PROMPT = tuple(TOKENIZER.encode("<|user|>What is the zorplex value of 'cat'?<|assistant|>"))
CONFIG = EngineConfig(name="hf", max_model_tokens=256)


class Engine:
    """A driver, the answers in the order of their delivery, and what is to happen between two tokens."""

    def __init__(self, folder: str, **settings: Any) -> None:
        from rl.engine_hf import HfDriver

        self.answers: dict[int, Answer] = {}
        self.batches: list[int] = []
        """Number of rows of each batch."""
        self.driver = HfDriver(CONFIG.model_copy(update=settings), folder, TOKENIZER, self.answers.__setitem__)
        self._num_tokens = 0

    def run(self, requests: dict[int, Request], events: dict[int, Callable[[], object]] | None = None) -> None:
        """Until nothing is left to sample; `events` happen after so many tokens of the longest row."""
        for key, request in requests.items():
            self.driver.add(key, request)
        left = dict(events or {})

        def between() -> bool:
            self._num_tokens += 1
            left.pop(self._num_tokens, lambda: None)()
            return True

        while self.driver.busy:
            self.batches.append(len(self.driver._turns))
            self.driver.step(between)
        assert not left

    def sample(self, key: int) -> Sample:
        answer = self.answers[key]
        assert isinstance(answer, Sample)
        return answer


@pytest.fixture
def engine(sharp_models: list[tuple[str, Any]]) -> Engine:
    return Engine(sharp_models[0][0])


def _request(
    seed: int = 0, max_tokens: int = 24, temperature: float = 1.0, prompt: tuple[int, ...] = PROMPT
) -> GenerateRequest:
    return GenerateRequest(
        token_ids=prompt, max_tokens=max_tokens, temperature=temperature, seed=seed, stop_pattern="x", to_the_end=True
    )


def _furthest(model: Any, prompt: tuple[int, ...], sample: Sample, temperature: float = 1.0) -> float:
    """Largest difference between the sample's log-probabilities and the model's."""
    import torch

    whole = torch.tensor([prompt + sample.token_ids])
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(input_ids=whole).logits[0, :-1] / temperature, -1)
    expected = logprobs.gather(-1, whole[0, 1:, None])[len(prompt) - 1 :, 0]
    return float((torch.tensor(sample.logprobs) - expected).abs().max())


def test_a_request_that_comes_while_a_batch_runs_does_not_wait_for_its_end(
    engine: Engine, sharp_models: list[tuple[str, Any]]
) -> None:
    # Longer, shorter, and a single token: each is padded differently beside the rows that run.
    late = {10: PROMPT * 8, 11: PROMPT[:3], 12: PROMPT[:1]}

    def come() -> None:
        for key, prompt in late.items():
            engine.driver.add(key, _request(key, max_tokens=10, prompt=prompt))

    engine.run({0: _request(0, max_tokens=90), 1: _request(1, max_tokens=60)}, {7: come})
    assert list(engine.answers) == [10, 11, 12, 1, 0]
    assert engine.batches[:2] == [2, 5]
    prompts = {0: PROMPT, 1: PROMPT} | late
    assert all(_furthest(sharp_models[0][1], prompt, engine.sample(key)) < 1e-4 for key, prompt in prompts.items())


def test_a_seed_samples_the_same_alone_and_among_rows_that_come_and_go(
    engine: Engine, sharp_models: list[tuple[str, Any]]
) -> None:
    requests = {key: _request(key, max_tokens=6 + 9 * key) for key in range(8)}

    def come() -> None:
        for key in (2, 5):
            engine.driver.add(key, requests[key])

    engine.run({key: requests[key] for key in (7, 3, 1)}, {4: come, 20: lambda: engine.driver.add(4, requests[4])})
    together = dict(engine.answers)
    for key in together:
        engine.run({key: requests[key]})
        assert engine.sample(key).token_ids == Sample.model_validate(together[key]).token_ids
    assert len({engine.sample(key).token_ids[:6] for key in together}) == len(together)


def test_each_row_has_its_own_temperature(engine: Engine, sharp_models: list[tuple[str, Any]]) -> None:
    import torch

    temperatures = {0: 0.0, 1: 0.5, 2: 1.0, 3: 2.0}
    engine.run({key: _request(7, temperature=temperature) for key, temperature in temperatures.items()})
    model = sharp_models[0][1]
    for key, temperature in temperatures.items():
        assert _furthest(model, PROMPT, engine.sample(key), temperature or 1.0) < 1e-4
    ids = torch.tensor([PROMPT])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, eos_token_id=None, pad_token_id=0
    )
    assert list(engine.sample(0).token_ids) == expected[0, len(PROMPT) :].tolist()


def test_tokens_are_as_frequent_as_the_model_says(engine: Engine, sharp_models: list[tuple[str, Any]]) -> None:
    import torch

    count, temperature = 4000, 0.8
    engine.run({seed: _request(seed, max_tokens=1, temperature=temperature) for seed in range(count)})
    with torch.inference_mode():
        logits = sharp_models[0][1](input_ids=torch.tensor([PROMPT])).logits[0, -1]
    expected = torch.softmax(logits / temperature, -1) * count
    seen = torch.bincount(
        torch.tensor([engine.sample(seed).token_ids[0] for seed in range(count)]), minlength=len(expected)
    )
    often = expected >= 5
    cells = torch.stack([torch.cat([of[often], of[~often].sum()[None]]) for of in (seen.float(), expected)])
    degrees = cells.shape[1] - 1
    assert degrees > 10
    chi_square = float(((cells[0] - cells[1]) ** 2 / cells[1]).sum())
    # Its mean and four of its standard deviations.
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


def test_rows_that_have_ended_are_not_computed_on(engine: Engine, sharp_models: list[tuple[str, Any]]) -> None:
    lengths = dict.fromkeys(range(6), 5) | {6: 50, 7: 90}
    engine.run({key: _request(key, max_tokens=length) for key, length in lengths.items()})
    assert engine.batches == [8, 2, 1]
    assert [len(engine.sample(key).token_ids) for key in lengths] == list(lengths.values())
    assert max(_furthest(sharp_models[0][1], PROMPT, engine.sample(key)) for key in (6, 7)) < 1e-4


def test_a_model_that_forgets_what_is_far_away_is_computed_anew(tmp_path: Path) -> None:
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    from rl.models import save_model

    config = MistralConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=12,
        initializer_range=0.3,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    save_model(model, TOKENIZER, str(tmp_path))
    engine = Engine(str(tmp_path))
    engine.run({0: _request(max_tokens=40)}, {20: lambda: engine.driver.add(1, _request(1))})
    assert engine.batches == [1, 2, 1]
    assert all(_furthest(model, PROMPT, engine.sample(key)) < 1e-4 for key in (0, 1))


def test_what_is_scored_ends_no_batch(engine: Engine) -> None:
    score = ScoreRequest(token_ids=PROMPT)
    engine.run({0: _request(max_tokens=20)}, {5: lambda: engine.driver.add(1, score)})
    assert list(engine.answers) == [1, 0]
    assert engine.batches == [1]


@pytest.mark.parametrize("kv_policy", ["keep", "recompute"])
def test_keys_and_values_outlive_a_new_batch_and_a_change_of_weights_only_as_the_policy_says(
    kv_policy: str, sharp_models: list[tuple[str, Any]]
) -> None:
    (folder, old), (_, new) = sharp_models
    engine = Engine(folder, kv_policy=kv_policy)

    def change() -> None:
        engine.driver.swap(new.state_dict(), 1)

    engine.run({0: _request(max_tokens=40)}, {10: change, 20: lambda: engine.driver.add(1, _request(1))})
    sample = engine.sample(0)
    assert sample.versions == (0,) * 10 + (1,) * 30
    assert _furthest(new, PROMPT, engine.sample(1)) < 1e-4
    before = sample.first(10)
    assert _furthest(old, PROMPT, before) < 1e-4
    after = Sample(
        token_ids=sample.token_ids[10:], logprobs=sample.logprobs[10:], versions=sample.versions[10:], finish="length"
    )
    behind_new_keys = _furthest(new, PROMPT + before.token_ids, after) < 1e-4
    assert behind_new_keys == (kv_policy == "recompute")


def test_a_row_that_is_dropped_does_not_disturb_the_others(engine: Engine) -> None:
    requests: dict[int, Request] = {key: _request(key, max_tokens=40) for key in range(4)}
    dropped: list[Sample | None] = []
    engine.run(requests, {9: lambda: dropped.append(engine.driver.drop(1))})
    assert list(engine.answers) == [0, 2, 3]
    (partial,) = dropped
    assert partial is not None
    assert (len(partial.token_ids), partial.finish) == (9, "abort")
    together = engine.sample(3)
    engine.run({3: requests[3]})
    assert engine.sample(3).token_ids == together.token_ids


def test_the_models_own_settings_of_generation_change_nothing(
    sharp_models: list[tuple[str, Any]], tmp_path: Path
) -> None:
    from transformers import GenerationConfig

    from rl.models import save_model

    save_model(sharp_models[0][1], TOKENIZER, str(tmp_path))
    GenerationConfig(repetition_penalty=3.0, eos_token_id=list(range(5, 60)), max_length=12).save_pretrained(tmp_path)
    engine = Engine(str(tmp_path))
    engine.run({0: _request()})
    assert len(engine.sample(0).token_ids) == 24
    assert _furthest(sharp_models[0][1], PROMPT, engine.sample(0)) < 1e-4


def test_weights_that_give_no_numbers_are_said(engine: Engine, sharp_models: list[tuple[str, Any]]) -> None:
    broken = {name: tensor * float("nan") for name, tensor in sharp_models[1][1].state_dict().items()}
    engine.driver.swap(broken, 3)
    with pytest.raises(RuntimeError, match="the model's logits are not numbers, with weights of version 3"):
        engine.run({0: _request()})
