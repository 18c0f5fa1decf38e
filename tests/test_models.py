"""Models by name: made once, whole, deterministic, and loaded as they were saved."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from rl.model_cache import cache_folder, made_once
from rl.models import load_model, load_tokenizer, prepare, prepare_warm, save_model
from rl.prompts import split_of
from rl.tiny import make_tiny, new_tiny, tiny_name
from rl.tokenizer import TinyTokenizer
from rl.types import Task
from rl.warm_start import WarmStart, in_columns, oracle_traces, warm_start

SHORT = WarmStart(
    lessons=((Task(name="simple"), 40), (Task(name="recursive"), 10)),
    haste=0.5,
    steps=6,
    batch_size=8,
    learning_rate=1e-3,
    warmup_steps=1,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATE_CACHE", str(tmp_path / "cache"))


def test_a_model_is_made_once_whoever_asks(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "file").write_text("whole")

    with ThreadPoolExecutor(4) as threads:
        folders = set(threads.map(lambda _: made_once("a", make), range(8)))
    assert folders == {tmp_path / "cache/models/a"}
    assert len(made) == 1
    assert [path.name for path in folders.pop().iterdir()] == ["file"]


def test_what_failed_half_way_is_not_there_and_is_made_again() -> None:
    def fail(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        made_once("a", fail)
    assert not (cache_folder() / "models/a").exists()
    folder = made_once("a", lambda folder: (folder / "other").touch())
    assert [path.name for path in folder.iterdir()] == ["other"]


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ORCHESTRATE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/orchestrate"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/orchestrate"


def test_tiny_has_one_to_three_million_parameters_and_a_tied_head() -> None:
    model: Any = new_tiny(0)
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 3e6
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == len(TinyTokenizer())


def test_tiny_is_deterministic_by_seed_and_leaves_the_random_state_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_tiny(tmp_path / name, seed, SHORT)
    assert torch.equal(torch.random.get_rng_state(), before)
    one, same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert one == same
    assert one != other


def test_a_saved_model_is_the_model(tmp_path: Path) -> None:
    model: Any = new_tiny(3)
    save_model(model, TinyTokenizer(), str(tmp_path / "model"))
    loaded: Any = load_model(str(tmp_path / "model"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    assert isinstance(tokenizer, TinyTokenizer)
    assert prepare(str(tmp_path / "model")).path == str(tmp_path / "model")


def test_a_lesson_brings_the_loss_down() -> None:
    losses = warm_start(new_tiny(0), TinyTokenizer(), 0, SHORT.model_copy(update={"steps": 25}))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_traces_are_of_the_training_split_and_some_are_of_an_oracle_in_haste() -> None:
    traces = oracle_traces(TinyTokenizer(), 5, SHORT)
    assert [trace.prompt.task.name for trace in traces] == ["simple"] * 40 + ["recursive"] * 10
    assert {split_of(trace.prompt) for trace in traces} == {"train"}
    patient = [trace for trace in traces if trace.num_tool_calls]
    assert all(trace.failure_mode == "success" for trace in patient)
    assert 0.2 < len(patient) / len(traces) < 0.8
    assert traces == oracle_traces(TinyTokenizer(), 5, SHORT)


@pytest.mark.parametrize(
    ("said", "taught"),
    [
        ("67 + 58 = 125. [ANSWER] 125", "7 + 8 = 15, 6 + 5 + 1 = 12. [ANSWER] 125"),
        ("4 + 5 = 9. [ANSWER] 9", "4 + 5 = 9, 0 + 0 + 0 = 0. [ANSWER] 9"),
        ("9 - 12 = -3. [ANSWER] -3", "9 - 12 = -3. [ANSWER] -3"),
        ("1 + 2 + 3 = 6. [ANSWER] 6", "1 + 2 + 3 = 6. [ANSWER] 6"),
        ("LOOKUP[cat]", "LOOKUP[cat]"),
    ],
)
def test_sums_of_two_are_taught_in_columns(said: str, taught: str) -> None:
    assert in_columns(said) == taught


def test_answers_in_columns_are_right() -> None:
    recipe = SHORT.model_copy(update={"lessons": ((Task(name="compositional"), 40),), "haste": 0.0})
    traces = oracle_traces(TinyTokenizer(), 3, recipe)
    assert {trace.failure_mode for trace in traces} == {"success"}
    assert all(trace.turns[-1].text.count(" = ") == 2 for trace in traces)


def test_another_recipe_is_another_model() -> None:
    assert len({tiny_name(0), tiny_name(1), tiny_name(0, SHORT)}) == 3


def test_a_few_traces_teach_a_model_once(tmp_path: Path) -> None:
    save_model(new_tiny(0), TinyTokenizer(), str(tmp_path / "base"))
    base = str(tmp_path / "base")
    taught = prepare_warm(base, 4).path
    assert taught != base
    before, after = (next(load_model(path).parameters()) for path in (base, taught))
    assert not torch.equal(before, after)
    written = Path(taught, "config.json").stat().st_mtime_ns
    assert prepare_warm(base, 4).path == taught
    assert Path(taught, "config.json").stat().st_mtime_ns == written
    assert len({taught, prepare_warm(base, 2).path, prepare_warm(base, 4, seed=1).path}) == 3


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere", "no-such-model", "a/b/c"])
def test_a_model_that_is_not_there(model: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no model `.*`\n\nhint: `tiny`, `smollm2`"):
        prepare(model)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json and \*\.safetensors were wanted"):
        prepare(str(tmp_path))
