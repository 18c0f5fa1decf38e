"""`orchestrate rl eval`: what a model can do, with a confidence interval, as a table, JSON and a picture.

MODEL -> folder -> engine -> converse -> EvaluationReport -> table, --json, --plot
"""

import asyncio
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import click

from bridge.cli.failure import Failure
from bridge.cli.options import json_option
from bridge.cli.rl_config import TaskLabel
from bridge.cli.rl_model import prepared
from bridge.cli.watch import Output
from bridge.terminal import columns, duration
from rl.config import EngineConfig, EngineName, RunConfig
from rl.rollout import RolloutSettings
from rl.system_prompts import PromptStyle
from rl.types import Difficulty, Prompt, Task, TaskName, Trajectory

if TYPE_CHECKING:
    from rl.evaluation import EvaluationReport
    from rl.generate import Generate
    from rl.tokenizer import Tokenizer

Questions = Literal["held_out", "train", "table"]
SCRIPTED = ("oracle", "random")
MOST_PASSED, MOST_FAILED = 3, 5
"""Conversations that `--show-samples` shows."""


@click.command("eval")
@click.argument("model", required=False)
@click.option("--model", "named", metavar="MODEL", help="The same as the argument.")
@click.option(
    "--task", "tasks", multiple=True, type=TaskLabel(), help="`simple`, `compositional/hard`, ...  [default: all four]"
)
@click.option("--difficulty", type=click.Choice(get_args(Difficulty)), help="Of `compositional`.  [default: easy]")
@click.option("--num-samples", "--samples", default=100, show_default=True, type=click.IntRange(1),
              help="Questions per task and seed.")  # fmt: skip
@click.option(
    "--seed", "--seeds", "seeds", multiple=True, type=click.IntRange(0), help="May be repeated.  [default: 42]"
)
@click.option("--questions", default="held_out", show_default=True, type=click.Choice(get_args(Questions)),
              help="Held out, as trained on, or the first about the table of the seed.")  # fmt: skip
@click.option("--temperature", type=click.FloatRange(0), help="0 takes the likeliest token.  [default: 1.0]")
@click.option("--max-turns", type=click.IntRange(1), help="Of one conversation.  [default: 5]")
@click.option("--max-tokens-per-turn", type=click.IntRange(1), help="[default: 150]")
@click.option("--max-tokens", type=click.IntRange(2), help="Of one conversation.  [default: 2048]")
@click.option("--prompt-style", type=click.Choice(get_args(PromptStyle)),
              help="What the model is told.  [default: guided; brief for `tiny`]")  # fmt: skip
@click.option("--engine", "engine_name", type=click.Choice(get_args(EngineName)), help="[default: vllm]")
@click.option("--gpus", default=0.0, type=click.FloatRange(0), help="GPUs of the engine.  [default: 0]")
@click.option("--concurrency", default=32, show_default=True, type=click.IntRange(1), help="Conversations at once.")
@click.option("--confidence", default=0.95, show_default=True, type=click.FloatRange(0.5, 0.9999),
              help="Of the intervals.")  # fmt: skip
@click.option("--show-samples", is_flag=True, help="Show up to 3 conversations that passed and 5 that failed.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Write a picture (PNG).")
@json_option
def evaluate(
    model: str | None,
    named: str | None,
    tasks: tuple[Task, ...],
    difficulty: Difficulty | None,
    num_samples: int,
    seeds: tuple[int, ...],
    questions: Questions,
    engine_name: EngineName | None,
    gpus: float,
    concurrency: int,
    confidence: float,
    show_samples: bool,
    plot: Path | None,
    as_json: bool,
    **rollout: Any,
) -> None:
    """Measure what MODEL can do: accuracy with its confidence interval, turns, tool calls, form, failure modes.

    MODEL is `tiny` (the default), `smollm2`, a folder, a Hugging Face id, the folder of a run or of one of its
    checkpoints (whose settings of conversations and engine are taken over); or `oracle` and `random`, the best and the
    worst there is.
    """
    if model and named and model != named:
        raise Failure(f"got two models, `{model}` and `{named}`", "give one of them")
    name = model or named or "tiny"
    asked = _tasks(tasks, difficulty)
    prompts = _prompts(asked, questions, seeds or (42,), num_samples)
    began = time.monotonic()
    note = _note(as_json)
    done = asyncio.run(_converse(name, prompts, rollout, engine_name, gpus, concurrency, (seeds or (42,))[0], note))

    from rl.evaluation import evaluation_report

    report = evaluation_report(name, done, seeds=seeds or (42,), confidence=confidence)
    if plot is not None:
        from rl.evaluation_plot import plot_evaluation

        plot.parent.mkdir(parents=True, exist_ok=True)
        plot_evaluation([report], plot)
    if as_json:
        Output(as_json=True).print_json(report.model_dump(mode="json"))
        if show_samples:
            print("\n\n".join(_shown(done)), file=sys.stderr)
        return
    print("\n".join(_screen(report, time.monotonic() - began)))
    if show_samples:
        print("\n" + "\n\n".join(_shown(done)))
    if plot is not None:
        print(f"\nplot  {plot}")


def _tasks(tasks: tuple[Task, ...], difficulty: Difficulty | None) -> list[Task]:
    """The tasks that were asked for, `compositional` ones at the difficulty that was asked for."""
    asked = list(tasks or (Task(name=name) for name in get_args(TaskName)))
    if difficulty is None:
        return asked
    if not any(task.name == "compositional" for task in asked):
        raise Failure("`--difficulty` belongs to the task `compositional`", "add `--task compositional`")
    return [Task(name=task.name, difficulty=difficulty) if task.name == "compositional" else task for task in asked]


def _prompts(tasks: Sequence[Task], questions: Questions, seeds: Sequence[int], count: int) -> list[Prompt]:
    """The questions of every task and seed."""
    from rl.prompts import LARGEST_SEED, PromptSet, stream

    if questions == "table":
        if beyond := [seed for seed in seeds if seed > LARGEST_SEED]:
            raise Failure(f"`--seed`: got {beyond[0]}, wanted at most {LARGEST_SEED}, the last table")
        return [prompt for task in tasks for seed in seeds for prompt in stream(task, seed, count)]
    sets = [PromptSet([task], questions, seed) for task in tasks for seed in seeds]
    return [prompts[number] for prompts in sets for number in range(count)]


async def _converse(
    name: str,
    prompts: Sequence[Prompt],
    rollout: dict[str, Any],
    engine_name: EngineName | None,
    gpus: float,
    concurrency: int,
    seed: int,
    note: Any,
) -> list[Trajectory]:
    from rl.run_folder import model_of
    from rl.tokenizer import TinyTokenizer

    if name in SCRIPTED:
        from rl.scripted import RandomEngine, ScriptedEngine

        tiny = TinyTokenizer()
        engine: Generate = ScriptedEngine(tiny) if name == "oracle" else RandomEngine(tiny)
        return await _ask(engine, tiny, prompts, _settings(rollout, None, tiny), seed, concurrency)

    model, run = model_of(name)
    folder = await asyncio.to_thread(prepared, model, 0 if run is None else run.seed, note)
    config = _engine_config(run, engine_name, rollout)

    from rl.engine import open_engine
    from rl.engine_environment import set_engine_environment

    set_engine_environment(config, gpus)
    # Of what vLLM does with other packages.
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    from rl.models import load_tokenizer

    tokenizer = await asyncio.to_thread(load_tokenizer, folder)
    settings = _settings(rollout, run, tokenizer)
    note(f"opening the engine `{config.name}`")
    opened = await open_engine(config, folder, tokenizer, version=_version(name), gpus=gpus)
    try:
        return await _ask(opened, tokenizer, prompts, settings, seed, concurrency)
    finally:
        await opened.close()


async def _ask(
    engine: "Generate",
    tokenizer: "Tokenizer",
    prompts: Sequence[Prompt],
    settings: RolloutSettings,
    seed: int,
    concurrency: int,
) -> list[Trajectory]:
    from rl.evaluation import converse

    try:
        return await converse(engine, tokenizer, prompts, settings, seed=seed, concurrency=concurrency)
    except ValueError as error:
        raise Failure(str(error)) from error


def _settings(rollout: dict[str, Any], run: RunConfig | None, tokenizer: "Tokenizer") -> RolloutSettings:
    """As the run that made the model had them, or as usual, but for what was asked for."""
    from rl.tokenizer import TinyTokenizer

    given = {name: value for name, value in rollout.items() if value is not None}
    if run is not None:
        return RolloutSettings.model_validate({**run.rollout.model_dump(), **given})
    usual = {"prompt_style": "brief"} if isinstance(tokenizer, TinyTokenizer) else {}
    return RolloutSettings.model_validate({**usual, **given})


def _engine_config(run: RunConfig | None, name: EngineName | None, rollout: dict[str, Any]) -> EngineConfig:
    config = EngineConfig() if run is None else run.engine
    longest = max(config.max_model_tokens, rollout["max_tokens"] or 0)
    return config.model_copy(update={"name": name or config.name, "max_model_tokens": longest})


def _version(name: str) -> int:
    """Updates behind the weights of a run or a checkpoint, 0 for any other model."""
    from rl.checkpoint import read_state
    from rl.run_folder import model_of

    folder, _ = model_of(name)
    checkpoint = Path(folder).parent
    return read_state(checkpoint).update if folder != name and (checkpoint / "state.json").is_file() else 0


def _note(as_json: bool) -> Any:
    return lambda text: print(text, file=sys.stderr, flush=True)


def _screen(report: "EvaluationReport", took_s: float) -> list[str]:
    from rl.evaluation import table

    head, *rows = table(report)
    questions = f"{report.overall.num_samples} questions, seeds {', '.join(map(str, report.seeds))}"
    version = f", version {report.version}" if report.version else ""
    lines = columns([word.upper() for word in head], rows)
    return [f"{report.model}{version}: {questions}, {duration(took_s)}", "", *lines]


def _shown(done: Sequence[Trajectory]) -> list[str]:
    """Some conversations to be read: a few that passed, more that failed."""
    from bridge.terminal import visible
    from rl.evaluation import transcript

    passed = [one for one in done if one.failure_mode == "success"][:MOST_PASSED]
    failed = [one for one in done if one.failure_mode != "success"][:MOST_FAILED]
    return ["\n".join(map(visible, transcript(one).splitlines())) for one in (*passed, *failed)]
