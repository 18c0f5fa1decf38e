"""`orchestrate rl`: settings, training, stopping, resuming and evaluating, scripted and real."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from bridge.cli.failure import Failure
from bridge.cli.main import main
from bridge.cli.rl_config import run_config, setting
from bridge.cli.rl_view import LiveTraining, Training, picture, sparks, view_of
from rl.config import RunConfig
from rl.metrics import METRICS, Notice, RunEvent
from rl.run_folder import model_of, read_config, run_summary
from rl.train import train
from rl.virtual_clock import run_virtually

SHORT = ["--stack", "scripted", "--groups-per-update", "1", "--group-size", "4", "--evaluation-prompts", "2"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The command in this process: exit code, stdout, stderr."""
    code = main(["rl", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def scripted(**settings: Any) -> RunConfig:
    short = {"groups_per_update": 2, "group_size": 4, "updates": 6, "evaluation_prompts": 4, "checkpoint_every": 2}
    return RunConfig.model_validate({"stack": "scripted", **short, **settings})


def test_every_fault_of_the_settings_is_told_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "updates: three\nlearner:\n  loss: {name: grpoo}\n  learning_rat: 1\n"
        "tasks:\n  - {name: simple, difficulty: hard}\n"
    )
    with pytest.raises(Failure) as caught:
        run_config(file, {("engine", "cache_gb"): ("--set", -1)})
    told = caught.value.format_message()
    assert f"{file}:1:10: error: `updates`: got `three`, wanted a whole number" in told
    assert f"{file}:3:16: error: `name`: got `grpoo`, wanted one of" in told and "did you mean `grpo`?" in told
    assert f"{file}:4:3: error: unknown key `learning_rat` in `learner`\n  hint: did you mean `learning_rate`?" in told
    assert f"{file}:6:5: error: `tasks[0]`: task `simple` has no difficulty, got `hard`" in told
    assert "error: `--set`: `cache_gb`: got `-1`, wanted more than 0" in told
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- 1\n", "wanted a mapping"),
        ("a: [\n", "error"),
        ("engine: {max_model_tokens: 100}\n", "`rollout.max_tokens` is 2048, more than the 100"),
        ("nonsense: 1\n", "unknown key `nonsense`"),
    ],
)
def test_files_that_are_no_config_are_refused(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(Failure) as caught:
        run_config(file, {})
    assert told in caught.value.format_message() and str(file) in caught.value.format_message()


def test_a_config_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"cannot read the config `.*none\.yaml`: No such file"):
        run_config(tmp_path / "none.yaml", {})


def test_flags_win_over_the_file_and_the_file_over_the_earlier_run(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("updates: 7\nlearner: {learning_rate: 0.5, loss: {name: cispo}}\n")
    place, value = setting("learner.learning_rate=1e-3")
    base = RunConfig(updates=3, group_size=5).model_dump(mode="json")
    made = run_config(file, {("seed",): ("--seed", 9), place: ("--set", value)}, base)
    assert (made.updates, made.group_size, made.seed) == (7, 5, 9)
    assert (made.learner.learning_rate, made.learner.loss.name) == (1e-3, "cispo")


def test_an_empty_file_is_the_default_run(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("# nothing\n")
    assert run_config(file, {}) == RunConfig()


@pytest.mark.parametrize("text", ["updates", "=3", "updates=[", "updatess=3"])
def test_settings_that_are_none_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    code, _, told = run(capsys, "train", *SHORT, "--folder", tmp_path / "run", "--set", text)
    assert code == 2 and "--set" in told
    assert not (tmp_path / "run").exists()


def test_tiny_is_told_what_it_was_made_on() -> None:
    assert RunConfig().rollout.prompt_style == "brief"
    assert RunConfig.model_validate({"rollout": {"prompt_style": "guided"}}).rollout.prompt_style == "guided"
    assert RunConfig(model="smollm2").rollout.prompt_style == "guided"


def test_a_run_is_made_resumed_and_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tasks = ["--task", "compositional/hard", "--task", "recursive/2"]
    code, said, told = run(capsys, "train", *SHORT, *tasks, "--updates", 1, "--folder", folder)
    assert code == 0, told
    assert "update 1/1  reward" in said and "held-out accuracy of version 1" in said and f"run       {folder}" in said
    config = read_config(folder)
    assert config is not None and [task.label for task in config.tasks] == ["compositional/hard", "recursive/2"]

    code, _, told = run(capsys, "train", *SHORT, "--folder", folder)
    assert code == 2 and "has a run of its own already" in told

    code, said, told = run(capsys, "train", "--folder", folder, "--resume", "--updates", 2, "--json")
    assert code == 0, told
    assert (document := json.loads(said))["updates"] == 2 and document["finished"] and not document["interrupted"]
    assert document["accuracy_interval"]["low"] <= document["accuracy"] <= document["accuracy_interval"]["high"]
    assert "update 2/2" in told

    code, _, told = run(capsys, "train", "--folder", folder, "--resume", "--updates", 3, "--seed", 5)
    assert code == 2 and "`seed` was `0` and is `5`" in told


def test_what_is_not_there_cannot_be_resumed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "needs the folder" in run(capsys, "train", "--resume")[2]
    code, _, told = run(capsys, "train", "--resume", "--folder", tmp_path)
    assert code == 2 and "there is no run" in told


def test_a_task_or_a_model_that_does_not_exist_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, told = run(capsys, "train", "--task", "simpel", "--folder", tmp_path / "run")
    assert code == 2 and "did you mean `simple`?" in told
    code, _, told = run(capsys, "train", "--model", "./nowhere", "--folder", tmp_path / "run")
    assert code == 2 and "there is no model `./nowhere`" in told
    assert not (tmp_path / "run").exists()
    code, _, told = run(capsys, "model", tmp_path)
    assert code == 2 and "holds no model" in told


def test_an_interrupted_run_is_left_with_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = [*SHORT, "--updates", "1000", "--folder", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "bridge.cli.main", "rl", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (folder / METRICS).exists() or not (folder / METRICS).read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, told
    assert f"hint: `orchestrate rl train --resume --folder {folder}`" in told
    summary = run_summary(folder)
    assert 0 < summary.updates < 1000 and not summary.finished
    lines = (folder / METRICS).read_text().splitlines()
    assert [json.loads(line)["train"]["update"] for line in lines] == list(range(summary.updates))


def events_of(folder: Path, config: RunConfig) -> list[RunEvent]:
    events: list[RunEvent] = []
    run_virtually(train(config, str(folder), report=events.append))
    return events


def test_the_live_view_fits_a_terminal(tmp_path: Path) -> None:
    config = scripted(evaluate_every=3)
    training = Training(config, str(tmp_path))
    assert picture(training)[1] == "waiting for the first update"
    for event in events_of(tmp_path / "run", config):
        training.add(event)
    training.add(Notice(event="generator_lost", message="generator 0 is lost: \x1b[2Jgone"))
    shown = picture(training)
    assert shown[0].startswith("tiny on simple, stack scripted")
    words = "\n".join(shown)
    assert f"{'━' * 30} 6/6" in words and "staleness" in words and "idle" in words and "held out" in words
    assert "generator 0 is lost: gone" in words
    assert len(shown) < 14


def test_the_live_view_is_drawn_on_a_terminal(tmp_path: Path) -> None:
    master, slave = os.openpty()
    drawn: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):
            while chunk := os.read(master, 4096):
                drawn.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with open(slave, "w") as stream:  # noqa: PTH123
        config = scripted()
        view = view_of(Training(config, str(tmp_path)), stream)
        assert isinstance(view, LiveTraining)
        for event in events_of(tmp_path / "run", config):
            view.add(event)
        view.note("said above")
        view.close()
    reader.join(30)
    os.close(master)
    text = b"".join(drawn).decode()
    assert "6/6" in text and "held-out accuracy of version 6" in text and "said above" in text


def test_many_numbers_are_drawn_in_few_cells() -> None:
    assert sparks([], 10) == ""
    assert sparks([1.0, 1.0], 10) == "▁▁"
    assert sparks([0.0, 0.5, 1.0], 10) == "▁▅█" or sparks([0.0, 0.5, 1.0], 10) == "▁▄█"
    assert len(sparks([float(number) for number in range(1000)], 60)) <= 60


def test_the_best_and_the_worst_are_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, said, told = run(
        capsys,
        "eval",
        "oracle",
        "--num-samples",
        3,
        "--seed",
        1,
        "--seed",
        2,
        "--show-samples",
        "--plot",
        tmp_path / "p.png",
    )
    assert code == 0, told
    assert "oracle: 24 questions, seeds 1, 2" in said and "compositional/easy  100.0%" in said
    assert "success, reward 1.20" in said
    with Image.open(tmp_path / "p.png") as made:
        assert made.format == "PNG"

    asked = ["--task", "compositional", "--difficulty", "hard", "--questions", "table", "--num-samples", 4]
    code, said, told = run(capsys, "eval", "--model", "random", *asked, "--json", "--confidence", 0.9)
    assert code == 0, told
    report = json.loads(said)
    assert (report["overall"]["accuracy"], report["confidence"], report["seeds"]) == (0.0, 0.9, [42])
    assert [task["label"] for task in report["tasks"]] == ["compositional/hard"]


def test_questions_that_cannot_be_asked_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert "got two models" in run(capsys, "eval", "oracle", "--model", "tiny")[2]
    assert (
        "belongs to the task `compositional`"
        in run(capsys, "eval", "oracle", "--task", "simple", "--difficulty", "hard")[2]
    )
    code, _, told = run(capsys, "eval", "oracle", "--task", "simple", "--max-tokens", 4)
    assert code == 2 and "leaves no room" in told
    assert run(capsys, "eval", "nobody/knows/this")[0] == 2


def test_help_says_what_there_is() -> None:
    from bridge.cli.rl import rl

    for command in ([], ["train"], ["eval"], ["model"]):
        assert CliRunner().invoke(rl, [*command, "--help"]).exit_code == 0


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The shape of `tiny`, with random weights."""
    from rl.models import save_model
    from rl.tiny import new_tiny
    from rl.tokenizer import TinyTokenizer

    folder = str(tmp_path_factory.mktemp("model"))
    torch.manual_seed(0)
    save_model(new_tiny(0), TinyTokenizer(), folder)
    return folder


@pytest.mark.timeout(600)
def test_a_real_run_is_trained_resumed_and_measured(model_folder: str, tmp_path: Path) -> None:
    folder, file = tmp_path / "run", tmp_path / "run.yaml"
    file.write_text(
        f"model: {model_folder}\n"
        "updates: 1\ngroups_per_update: 1\ngroup_size: 2\ngroups_in_flight: 2\nevaluation_prompts: 2\n"
        "filter_zero_variance: false\n"
        "rollout: {prompt_style: brief, max_tokens: 200, max_tokens_per_turn: 16}\n"
        "engine: {max_model_tokens: 256, cache_gb: 0.05}\n"
    )

    def orchestrate(*arguments: object) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "bridge.cli.main", "rl", *map(str, arguments), "--json"],
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    summary = orchestrate("train", "--stack", "local", "--config", file, "--folder", folder)
    assert (summary["updates"], summary["evaluated_version"]) == (1, 1)
    assert summary["model"] == f"{summary['checkpoint']}/trainer"
    summary = orchestrate("train", "--folder", folder, "--resume", "--updates", 2, "--engine", "hf")
    assert (summary["updates"], summary["finished"]) == (2, True)

    asked = ["--task", "simple", "--num-samples", 3, "--temperature", 0, "--engine", "hf"]
    report = orchestrate("eval", folder, *asked)
    assert (report["version"], report["overall"]["num_samples"]) == (2, 3)
    assert orchestrate("eval", summary["checkpoint"], *asked)["overall"] == report["overall"]
    assert model_of(str(folder))[0] == summary["model"] == model_of(summary["model"])[0]
    assert model_of("smollm2") == ("smollm2", None)
