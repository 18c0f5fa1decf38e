"""The folder of a run, read: what it was asked for, how far it has come, and where its model is.

    folder | checkpoint | model name -> model_of -> what `rl.models.prepare` takes      folder -> run_summary

Light: imports no torch.
"""

import json
from pathlib import Path
from typing import Any

from rl.checkpoint import STATE, TRAINER, Checkpoints, read_state, trainer_folder
from rl.config import RunConfig
from rl.evaluation import Interval
from rl.metrics import EVALUATIONS, METRICS
from rl.train import CONFIG
from rl.types import Frozen


class RunSummary(Frozen):
    """How far a run has come."""

    folder: str
    """Absolute."""
    checkpoint: str
    """Folder of the newest checkpoint."""
    model: str
    """Folder of the trained model in it, empty for a stack that has none."""
    updates: int
    """Updates that are in the checkpoint."""
    finished: bool
    """Whether those are all that were asked for."""
    mean_reward: float | None
    """Of the last update's trajectories."""
    accuracy: float | None
    """Of the last evaluation on held-out prompts, None before the first."""
    accuracy_interval: Interval | None
    evaluated_version: int | None
    """Version of the weights that were evaluated last."""
    trained_tokens: int
    wasted_tokens: int


def read_config(folder: Path) -> RunConfig | None:
    """What the run was asked for, None where `folder` is not that of a run."""
    path = folder / CONFIG
    if not path.is_file() or not (folder / "checkpoints").is_dir():
        return None
    return RunConfig.model_validate_json(path.read_bytes())


def run_summary(folder: Path) -> RunSummary:
    """Raises FileNotFoundError where there is no run, or none that has a checkpoint yet."""
    config, newest = read_config(folder), Checkpoints(folder).newest()
    if config is None or newest is None:
        raise FileNotFoundError(f"`{folder}` has no run with a checkpoint")
    state = read_state(newest)
    update = _last_line(folder / METRICS)
    evaluation = _last_line(folder / EVALUATIONS)
    overall = None if evaluation is None else evaluation["report"]["overall"]
    model = Path(trainer_folder(newest))
    return RunSummary(
        folder=str(folder.absolute()),
        checkpoint=str(newest.absolute()),
        model=str(model.absolute()) if (model / "config.json").exists() else "",
        updates=state.update,
        finished=state.update >= config.updates,
        mean_reward=None if update is None else update["train"]["mean_reward"],
        accuracy=None if overall is None else overall["accuracy"],
        accuracy_interval=None if overall is None else Interval.model_validate(overall["accuracy_interval"]),
        evaluated_version=None if evaluation is None else evaluation["version"],
        trained_tokens=state.tokens.trained,
        wasted_tokens=state.tokens.wasted,
    )


def model_of(name: str) -> tuple[str, RunConfig | None]:
    """What to `prepare` for a run's folder or a checkpoint's (its newest weights), with the config of the run.

    Any other name is a model's own.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name, None
    config, newest = read_config(folder), Checkpoints(folder).newest()
    if config is not None and newest is not None:
        return trainer_folder(newest), config
    checkpoint = folder.parent if folder.name == TRAINER else folder
    if (checkpoint / STATE).is_file():
        run = checkpoint.absolute().parent.parent
        return trainer_folder(checkpoint), read_config(run)
    return name, None


def _last_line(path: Path) -> dict[str, Any] | None:
    """The last whole line, None where there is none."""
    if not path.exists():
        return None
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    found: dict[str, Any] | None = json.loads(lines[-1]) if lines else None
    return found
