"""`orchestrate rl train`: one training run in a folder, watched to its end, or stopped and resumed later."""

import asyncio
import json
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any, get_args

import click

from bridge.cli.failure import FAILED, INTERRUPTED, Failure
from bridge.cli.options import json_option
from bridge.cli.rl_config import Given, TaskLabel, run_config, setting
from bridge.cli.rl_view import Training, TrainingView, view_of
from bridge.cli.watch import Output
from rl.config import EngineName, RunConfig, StackName, TransportName
from rl.loss_settings import LossName
from rl.metrics import RunEvent
from rl.run_folder import RunSummary
from rl.types import Task

_PLACES = {
    "stack": ("stack",),
    "model": ("model",),
    "updates": ("updates",),
    "seed": ("seed",),
    "groups_per_update": ("groups_per_update",),
    "group_size": ("group_size",),
    "max_staleness": ("max_staleness",),
    "stale_policy": ("stale_policy",),
    "temperature": ("rollout", "temperature"),
    "max_turns": ("rollout", "max_turns"),
    "engine": ("engine", "name"),
    "generators": ("num_generators",),
    "groups_in_flight": ("groups_in_flight",),
    "transport": ("transport",),
    "loss": ("learner", "loss", "name"),
    "learning_rate": ("learner", "learning_rate"),
    "checkpoint_every": ("checkpoint_every",),
    "evaluate_every": ("evaluate_every",),
    "evaluation_prompts": ("evaluation_prompts",),
}
"""Flag -> what it sets."""


@click.command("train")
@click.option("--stack", type=click.Choice(get_args(StackName)), help="What hosts the parts.  [default: local]")
@click.option("--model", help="`tiny`, `smollm2`, a folder, or a Hugging Face id.  [default: tiny]")
@click.option(
    "--task", "tasks", multiple=True, type=TaskLabel(), help="`simple`, `compositional/hard`, ...; may be repeated."
)
@click.option("--updates", type=int, help="Optimizer steps in all.  [default: 100]")
@click.option("--seed", type=int, help="Of the prompts, the sampling and `tiny`.  [default: 0]")
@click.option("--groups-per-update", type=int, help="Prompts of one update.  [default: 8]")
@click.option("--group-size", type=int, help="Conversations about one prompt.  [default: 8]")
@click.option("--max-staleness", type=int, help="Versions that data may be old; 0 is synchronous.  [default: 2]")
@click.option("--stale-policy", type=click.Choice(["pace", "drop"]), help="What keeps that bound.  [default: pace]")
@click.option("--temperature", type=float, help="Of sampling.  [default: 1.0]")
@click.option("--max-turns", type=int, help="Of one conversation.  [default: 5]")
@click.option("--engine", type=click.Choice(get_args(EngineName)), help="What samples.  [default: vllm]")
@click.option("--generators", type=int, help="Engines that sample at once.  [default: 1]")
@click.option("--groups-in-flight", type=int, help="Groups that one generator samples at once.  [default: 8]")
@click.option("--transport", type=click.Choice(get_args(TransportName)), help="How weights travel.")
@click.option("--loss", type=click.Choice(get_args(LossName)), help="What is minimised.  [default: decoupled_ppo]")
@click.option("--learning-rate", type=float, help="Of AdamW.  [default: 1e-05]")
@click.option("--checkpoint-every", type=int, help="Updates between checkpoints.  [default: 20]")
@click.option("--evaluate-every", type=int, help="Updates between evaluations; 0 is at the end alone.  [default: 0]")
@click.option("--evaluation-prompts", type=int, help="Held-out prompts of one evaluation.  [default: 100]")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Any setting: `learner.num_processes=2`.")
@click.option("--config", "file", type=click.Path(path_type=Path), help="YAML file of settings; flags override it.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the run lives.  [default: rl-runs/TIME]")
@click.option("--resume", is_flag=True, help="Go on with the run in the folder, from its newest checkpoint.")
@json_option
def train(
    tasks: tuple[Task, ...],
    settings: tuple[str, ...],
    file: Path | None,
    folder: Path | None,
    resume: bool,
    as_json: bool,
    **flags: Any,
) -> int:
    """Train a model on the Zorplex tasks with asynchronous RL.

    The folder gets config.json, metrics.jsonl, evaluations.jsonl, tensorboard/ and checkpoints/. Ctrl-C ends the run
    with a checkpoint after the update that goes on, a second one at once; `--resume` goes on from there, also after a
    crash.

    Exit code 0: done, 1: the run failed, 2: the settings do not fit, 130: interrupted.
    """
    if resume and folder is None:
        raise Failure("`--resume` needs the folder of the run", "add `--folder FOLDER`")
    given: Given = {
        place: (f"--{name.replace('_', '-')}", flags[name])
        for name, place in _PLACES.items()
        if flags[name] is not None
    }
    if tasks:
        given["tasks",] = ("--task", [task.model_dump() for task in tasks])
    for text in settings:
        place, value = setting(text)
        given[place] = ("--set", value)
    place_of_run = folder or Path("rl-runs", time.strftime("%Y%m%d-%H%M%S"))
    config = run_config(file, given, _earlier(place_of_run) if resume else None)
    output = Output(as_json=as_json)
    training = Training(config, str(place_of_run))
    view = view_of(training, sys.stderr if as_json else sys.stdout)
    try:
        summary, interrupted = asyncio.run(_run(config, place_of_run, resume, view))
    finally:
        view.close()
    if as_json and summary is not None:
        output.print_json({**summary.model_dump(mode="json"), "interrupted": interrupted})
    elif summary is not None:
        print("\n".join(_words(summary)))
    if not interrupted:
        return 0
    _say_how_to_resume(place_of_run, summary)
    return INTERRUPTED


async def _run(config: RunConfig, folder: Path, resume: bool, view: TrainingView) -> tuple[RunSummary | None, bool]:
    """The run to its end; what there is in the folder then, and whether Ctrl-C ended it."""
    from rl import train as training
    from rl.run_folder import run_summary

    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    stop, begun = asyncio.Event(), asyncio.Event()

    def interrupt() -> None:
        if stop.is_set() or not begun.is_set():
            stop.set()
            task.cancel()
        else:
            stop.set()
            view.note("stopping after this update; Ctrl-C again stops at once")

    def report(event: RunEvent) -> None:
        begun.set()
        view.add(event)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    # Of what vLLM does with other packages.
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    try:
        await _prepare(config, view)
        view.note(f"run in `{folder}`")
        result = await training.train(config, str(folder), resume, report, stop=stop)
        interrupted = result.updates < config.updates
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
        interrupted = True
    except training.RunRefused as error:
        raise Failure(str(error)) from error
    except Exception as error:
        raise _failed(error, folder) from error
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    try:
        return run_summary(folder), interrupted
    except FileNotFoundError:
        return None, interrupted


async def _prepare(config: RunConfig, view: TrainingView) -> None:
    """The model is there before anything starts."""
    if config.stack == "scripted":
        return
    from bridge.cli.rl_model import prepared

    await asyncio.to_thread(prepared, config.model, config.seed, view.note)


def _earlier(folder: Path) -> dict[str, Any] | None:
    """The settings of the run that is resumed."""
    from rl.train import CONFIG

    path = folder / CONFIG
    if not path.is_file():
        raise Failure(f"there is no run in `{folder}`", "start it without `--resume`")
    earlier: dict[str, Any] = json.loads(path.read_text())
    return earlier


class _RunFailed(Failure):
    """The run itself failed."""

    exit_code = FAILED


def _failed(error: Exception, folder: Path) -> Failure:
    if isinstance(error, Failure):
        return error
    if isinstance(error, ModuleNotFoundError):
        hint = "`pip install 'sygaldry-ray[rl]'`, or `[rl-gpu]` where there are GPUs"
        return Failure(f"training needs the package `{error.name}`", hint)
    message = str(error).strip() or type(error).__name__
    hint = f"what was reached is kept: `orchestrate rl train --resume --folder {folder}`"
    if "\n\nhint:" in message:
        return _RunFailed(f"the run failed: {message}\nhint: {hint}")
    return _RunFailed(f"the run failed: {message} ({type(error).__name__})", hint)


def _words(summary: RunSummary) -> list[str]:
    """The end of a run, for people."""
    rows = [("updates", f"{summary.updates}{'' if summary.finished else ' so far'}")]
    if summary.mean_reward is not None:
        rows.append(("reward", f"{summary.mean_reward:.3f} in the last update"))
    interval = summary.accuracy_interval
    if summary.accuracy is not None and interval is not None:
        held_out = f"{summary.accuracy:.1%} on held-out prompts ({interval.low:.1%} - {interval.high:.1%})"
        rows.append(("accuracy", held_out))
    rows += [("tokens", f"{summary.trained_tokens} trained on, {summary.wasted_tokens} wasted"),
             ("run", summary.folder)]  # fmt: skip
    if summary.model:
        rows.append(("model", summary.model))
    return [f"{name:<10}{text}" for name, text in rows]


def _say_how_to_resume(folder: Path, summary: RunSummary | None) -> None:
    if summary is None:
        print("interrupted before the first checkpoint: nothing is kept", file=sys.stderr)
        return
    print(
        f"interrupted; {summary.updates} updates are kept\n\nhint: `orchestrate rl train --resume --folder {folder}`",
        file=sys.stderr,
    )
