"""TRL beside us: the same prompts, lengths and rewards go in, and a cell's run comes out."""

import asyncio
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from rl.bench.config import BenchConfig
from rl.bench.peer_environment import NoEnvironment, peer_python
from rl.bench.peer_tokenizer import HuggingFaceTiny
from rl.bench.peer_trl import PEER, PeerRequest, run_peer
from rl.bench.peer_trl_run import FixedLengths, Workload, micro_batch
from rl.bench.results import CellRun
from rl.generate import GenerateRequest, Sample
from rl.ledger import group_id
from rl.lengths import LengthTail
from rl.prompts import PromptSet
from rl.rollout import rollout
from rl.system_prompts import messages
from rl.tokenizer import TinyTokenizer, encode_messages

TINY = TinyTokenizer()
CONFIG = BenchConfig(groups_per_update=2, group_size=3, lengths=LengthTail(median_tokens=8, max_tokens=24))


@pytest.fixture
def workload(tmp_path: Path) -> Workload:
    run = CellRun(key=PEER, seed=5, repeat=0, order=0, load_before=0.0)
    request = PeerRequest(config=CONFIG, run=run, model_folder=str(tmp_path), cores=(0,), folder=str(tmp_path))
    return Workload(request, TINY)


@given(some.lists(some.one_of(some.text(max_size=8), some.sampled_from([*TINY.pieces, "<|user|>", "<|end|>"]))))
def test_the_tokenizer_for_transformers_has_the_same_ids_and_text(words: list[str]) -> None:
    text = "".join(words)
    theirs = HuggingFaceTiny(TINY)
    ids = TINY.encode(text)
    if text:
        assert theirs(text=[text])["input_ids"] == [ids]
    assert theirs.batch_decode([ids], skip_special_tokens=True) == [TINY.decode(ids, skip_special_tokens=True)]
    assert (theirs.pad_token_id, theirs.eos_token_id, len(theirs)) == (0, 1, len(TINY))


def test_prompts_and_lengths_are_those_of_our_run(workload: Workload) -> None:
    rows = workload.rows(3)
    prompts = PromptSet([CONFIG.task], "train", 5)
    assert [row["index"] for row in rows] == list(range(6))
    for row in rows:
        ours = encode_messages(TINY, messages(prompts[row["index"]], CONFIG.prompt_style))
        assert HuggingFaceTiny(TINY)(text=[row["prompt"]])["input_ids"] == [ours]
    expected = [CONFIG.lengths.length(5, group_id(index), sample) for index in (2, 3) for sample in range(3)]
    assert workload.lengths(1) == expected


def test_every_row_ends_when_it_has_its_length() -> None:
    lengths, width, end = [1, 3, 2], 4, 1
    generator = torch.Generator().manual_seed(0)
    processor = FixedLengths(lengths, width, [end])
    rows = torch.full((3, width), 7)
    while rows.shape[1] < width + max(lengths):
        scores = processor(rows, torch.randn(3, 12, generator=generator))
        rows = torch.cat([rows, torch.multinomial(scores.softmax(-1), 1, generator=generator)], 1)
    sampled = rows[:, width:]
    assert [row.tolist().index(end) + 1 for row in sampled] == lengths


async def test_a_sample_is_worth_what_it_is_in_a_run_of_ours(workload: Workload) -> None:
    prompt = PromptSet([CONFIG.task], "train", 5)[0]
    text = f"LOOKUP[{prompt.words[0]}]\n[ANSWER] {prompt.answer}"
    length = workload.lengths(0)[1]
    ids = tuple(TINY.encode(text)[-length:])

    async def sampled(request: GenerateRequest) -> Sample:
        return Sample(token_ids=ids, logprobs=(0.0,) * len(ids), versions=(0,) * len(ids), finish="length")

    ours = await rollout(sampled, TINY, prompt, workload.settings, group_id=group_id(0), sample=1, seed=5)
    theirs = await asyncio.to_thread(workload.judged, 0, 1, list(ids))
    assert theirs == ours and theirs.num_sampled == len(ids)


def test_a_forward_pass_has_as_many_samples_as_fit_in_equal_parts() -> None:
    assert micro_batch(32, 100) == 32
    assert micro_batch(32, 300) == 16
    assert micro_batch(6, 3000) == 2
    assert micro_batch(6, 10**6) == 1


@pytest.mark.timeout(1200)
def test_trl_trains_on_the_same_tokens_in_its_own_environment(quick_model: str, tmp_path: Path) -> None:
    try:
        peer_python()
    except NoEnvironment as error:
        pytest.skip(f"the registry does not have TRL: {error}")
    config = CONFIG.model_copy(
        update={"model": quick_model, "updates": 2, "warmup_updates": 1, "max_tokens": 160, "cell_timeout_s": 600.0}
    )
    found = run_peer(config, 5, 1, tmp_path)
    assert not found.error
    lengths = [
        [config.lengths.length(5, group_id(index), sample) for index in range(first, first + 2) for sample in range(3)]
        for first in (0, 2, 4)
    ]
    assert (found.seed, found.repeat, found.num_updates, found.trajectories) == (5, 1, 2, 12)
    assert found.trained_tokens == found.generated_tokens == sum(lengths[1]) + sum(lengths[2])
    assert found.accounting is not None and found.accounting.balanced
    assert found.accounting.generated == sum(map(sum, lengths))
    assert len(found.update_s) == 2 and sum(found.update_s) == pytest.approx(found.duration_s)
    assert len(found.rewards) == 3 and found.trainer_idle + found.generator_idle == pytest.approx(1)
