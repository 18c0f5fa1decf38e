"""`orchestrate rl bench`: the stacks side by side, measured one after the other, watched to the end."""

import asyncio
import signal
import sys
import time
from pathlib import Path
from typing import Any, get_args

import click

from bridge.cli.failure import FAILED, INTERRUPTED, Failure
from bridge.cli.options import json_option
from bridge.cli.rl_bench_view import BenchView
from bridge.cli.rl_config import Given, TaskLabel, read_config, setting
from bridge.cli.watch import Output
from rl.bench.config import ALL_MODES, ALL_PARTS, BenchConfig, BenchStack
from rl.bench.results import Results
from rl.types import Task

_PLACES = {
    "repeats": ("repeats",),
    "updates": ("updates",),
    "warmup_updates": ("warmup_updates",),
    "model": ("model",),
    "generators": ("num_generators",),
    "staleness": ("staleness",),
    "stale_policy": ("stale_policy",),
}
_LISTS = {"stacks": ("stacks",), "modes": ("modes",), "parts": ("parts",)}
"""Flag -> what it sets."""


@click.command("bench")
@click.option("--stacks", metavar="NAME,...", help=f"Of {', '.join(get_args(BenchStack))}.  [default: all]")
@click.option("--modes", metavar="NAME,...", help=f"Of {', '.join(ALL_MODES)}.  [default: all]")
@click.option("--parts", metavar="NAME,...", help=f"Of {', '.join(ALL_PARTS)}.  [default: all]")
@click.option("--seeds", type=click.IntRange(1), help="Number of seeds; each runs through all cells.  [default: 3]")
@click.option("--repeats", type=int, help="Times that each seed does so.  [default: 1]")
@click.option("--updates", type=int, help="Measured updates of a run.  [default: 20]")
@click.option("--warmup-updates", type=int, help="Updates before those.  [default: 4]")
@click.option("--model", help="`tiny`, `smollm2`, a folder, or a Hugging Face id.  [default: tiny]")
@click.option("--task", type=TaskLabel(), help="`simple`, `compositional/hard`, ...  [default: simple]")
@click.option("--generators", type=int, help="Engines that sample at once.  [default: 1]")
@click.option("--staleness", type=int, help="Versions that `async` may be behind.  [default: 4]")
@click.option("--stale-policy", type=click.Choice(["pace", "drop"]), help="What keeps that bound.  [default: pace]")
@click.option("--quick", is_flag=True, help="Everything small and once: five minutes on two cores.")
@click.option("--emulate-accelerators", is_flag=True, help="Sleep for the device's time: measures orchestration alone.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Any setting: `lengths.sigma=1.0`.")
@click.option("--config", "file", type=click.Path(path_type=Path), help="YAML file of settings; flags override it.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the results.  [default: rl-bench/TIME]")
@click.option("--resume", is_flag=True, help="Keep what the folder has by the same code and settings, add the rest.")
@click.option("--schema", is_flag=True, help="Print the JSON Schema of results.json, and measure nothing.")
@json_option
def bench(
    task: Task | None,
    seeds: int | None,
    quick: bool,
    emulate_accelerators: bool,
    settings: tuple[str, ...],
    file: Path | None,
    output: Path | None,
    resume: bool,
    schema: bool,
    as_json: bool,
    **flags: Any,
) -> int:
    """Measure the stacks side by side on the same work, with the theoretical bound beside every number.

    Every run is a process of its own, with one core per role; the runs of all cells take turns. The folder gets
    results.json, which is written anew after every run, and report.html, one page that needs nothing else. Ctrl-C ends
    the benchmark with what it has.

    Exit code 0: done, 1: something could not be measured, 2: the settings do not fit, 130: interrupted.
    """
    if schema:
        Output(as_json=True).print_json(Results.model_json_schema())
        return 0
    if resume and output is None:
        raise Failure("`--resume` wants the folder to go on with", "give it by `--output`")
    given: Given = {place: (_flag(name), flags[name]) for name, place in _PLACES.items() if flags[name] is not None}
    for name, place in _LISTS.items():
        if flags[name] is not None:
            given[place] = (_flag(name), [word.strip() for word in flags[name].split(",") if word.strip()])
    if task is not None:
        given["task",] = ("--task", task.model_dump())
    if seeds is not None:
        given["seeds",] = ("--seeds", list(range(seeds)))
    if emulate_accelerators:
        given["emulate_accelerators",] = ("--emulate-accelerators", True)
    for text in settings:
        where, value = setting(text)
        given[where] = ("--set", value)
    base = BenchConfig.short().model_dump(mode="json", exclude_unset=True) if quick else None
    config = read_config(BenchConfig, file, given, base)
    folder = output or Path("rl-bench", time.strftime("%Y%m%d-%H%M%S"))
    view = BenchView(sys.stderr if as_json else sys.stdout)
    try:
        results, interrupted = asyncio.run(_run(config, folder, view, resume))
    finally:
        view.close()
    failed = results.num_failed
    paths = _conclude(results, folder)
    if as_json:
        counts = {"measured": len(results.runs), "failed": failed, "interrupted": interrupted}
        document = results.model_dump(mode="json", exclude={"config": True, "runs": {"__all__": {"timeline"}}})
        Output(as_json=True).print_json({"paths": paths, **counts, **document})
    else:
        from rl.bench.table import table

        if results.runs:
            print(table(results))
        print("\n".join(f"{name:<10}{path}" for name, path in paths.items()))
    if interrupted:
        print("interrupted; what was measured is kept", file=sys.stderr)
        return INTERRUPTED
    return FAILED if failed else 0


async def _run(config: BenchConfig, folder: Path, view: BenchView, resume: bool) -> tuple[Results, bool]:
    """What was found, and whether Ctrl-C ended it."""
    from bridge.cli.rl_model import prepared
    from rl.bench.run import Bench

    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    bench = Bench(config, folder, view.add, resume=resume)
    interrupted = asyncio.Event()

    def interrupt() -> None:
        interrupted.set()
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    try:
        for seed in config.seeds if config.model == "tiny" else config.seeds[:1]:
            await asyncio.to_thread(prepared, config.model, seed, view.note)
        view.note(f"benchmark in `{folder}`")
        await bench.run()
    except asyncio.CancelledError:
        if not interrupted.is_set():
            raise
    except OSError as error:
        raise Failure(f"the results cannot be kept in `{folder}`: {error.strerror or error}") from error
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    return bench.results, interrupted.is_set()


def _conclude(results: Results, folder: Path) -> dict[str, str]:
    """Name -> path of what there is in the folder; the page is written here."""
    from rl.bench.report import write_report
    from rl.bench.run import REPORT, RESULTS

    if not (folder / RESULTS).exists():
        return {}
    write_report(results, folder / REPORT)
    return {"results": str(folder / RESULTS), "report": str(folder / REPORT)}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
