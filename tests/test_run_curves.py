"""What runs learned, read from their folders."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from rl.config import RunConfig
from rl.evaluation import wilson
from rl.run_curves import plot_curves, read_curve
from rl.train import CONFIG
from rl.types import Task


def _run(folder: Path, correct: list[int], stack: str = "local", seed: int = 0) -> Path:
    """A run that was evaluated every 10 updates, each 20 s of training and 5 s of evaluation, on 100 prompts."""
    (folder / "checkpoints").mkdir(parents=True)
    config = RunConfig.model_validate({"stack": stack, "seed": seed, "tasks": [Task(name="simple")]})
    (folder / CONFIG).write_text(config.model_dump_json())
    lines = []
    for number, right in enumerate(correct):
        overall = {"accuracy": right / 100, "accuracy_interval": wilson(right, 100).model_dump()}
        line = {"version": 10 * number, "at": 1000.0 + 25 * number, "duration_s": 5.0, "report": {"overall": overall}}
        lines.append(json.dumps(line) + "\n")
    (folder / "evaluations.jsonl").write_text("".join(lines) + '{"half a li')
    return folder


def test_a_curve_has_the_points_of_its_run(tmp_path: Path) -> None:
    curve = read_curve(_run(tmp_path, [40, 60, 90], stack="ray", seed=2))
    assert (curve.model, curve.task, curve.stack, curve.seed) == ("tiny", "simple", "ray", 2)
    assert [(point.version, point.at_s, point.accuracy) for point in curve.points] == [
        (0, 0.0, 0.4),
        (10, 20.0, 0.6),
        (20, 40.0, 0.9),
    ]
    assert curve.rise == pytest.approx(0.5)
    assert curve.significant


def test_a_rise_within_the_intervals_is_not_significant(tmp_path: Path) -> None:
    assert not read_curve(_run(tmp_path / "a", [40, 50])).significant
    assert not read_curve(_run(tmp_path / "b", [90, 40])).significant


def test_curves_are_shown_and_plotted(tmp_path: Path) -> None:
    from bridge.cli.rl import rl

    runs = [str(_run(tmp_path / str(seed), [40, 70 + seed], seed=seed)) for seed in range(2)]
    picture = tmp_path / "curves.png"
    shown = CliRunner().invoke(rl, ["curves", *runs, "--plot", str(picture)])
    assert shown.exit_code == 0
    assert "40.0% (31% - 50%)" in shown.output and "+31.0 points" in shown.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    document = json.loads(CliRunner().invoke(rl, ["curves", *runs, "--json"]).stdout)
    assert [one["seed"] for one in document] == [0, 1]
    assert document[0]["significant"] is True


def test_a_folder_without_an_evaluation(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no run that was evaluated\n\nhint: `orchestrate rl train"):
        read_curve(tmp_path)


def test_several_tasks_and_stacks_share_a_picture(tmp_path: Path) -> None:
    curves = [read_curve(_run(tmp_path / stack, [10, 20, 30], stack=stack)) for stack in ("local", "ray", "monarch")]
    plot_curves([*curves, curves[0].model_copy(update={"task": "recursive"})], tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 10_000
