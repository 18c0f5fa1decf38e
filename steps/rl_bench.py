"""Measure the stacks of RL side by side; the results and a page about them are left in a folder.

Params -> BenchConfig -> rl.bench.run (a process for every measurement) -> results.json, report.html -> Outputs
"""

import asyncio
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from rl.bench.config import BenchConfig
from steps import Context, Frozen, PlanPath, StepError
from steps import Outputs as StepOutputs

if TYPE_CHECKING:
    from rl.bench.progress import Progress
    from rl.bench.results import Results


class Params(BenchConfig, Frozen):
    folder: PlanPath
    """Folder of the results. What was measured there by an earlier attempt, with the same settings, is not measured
    again."""


class Outputs(Frozen):
    folder: str
    """Absolute path of the folder."""
    results: str
    """Path of `results.json`."""
    report: str
    """Path of `report.html`, one page that needs no other file."""
    table: str
    """The summary as a Markdown table."""
    num_runs: int
    """Runs of cells."""
    num_failed: int
    """Measurements that failed; their errors are in the results."""


def run(params: Params, context: Context) -> StepOutputs:
    from rl.bench.report import write_report
    from rl.bench.run import REPORT, RESULTS
    from rl.bench.table import table

    folder = context.plan_dir / params.folder
    config = BenchConfig.model_validate(params.model_dump(exclude={"folder"}))
    try:
        results: Results = asyncio.run(_Run(config, folder, context).go())
    except FileNotFoundError as error:
        raise StepError(str(error)) from error
    if results.runs and all(run.error for run in results.runs):
        raise StepError(f"nothing could be measured: {results.runs[0].error}")
    write_report(results, folder / REPORT)
    return Outputs(
        folder=str(folder),
        results=str(folder / RESULTS),
        report=str(folder / REPORT),
        table=table(results),
        num_runs=len(results.runs),
        num_failed=results.num_failed,
    ).model_dump(mode="json")


class _Run:
    """One benchmark, which ends with what it has when the step is to end."""

    def __init__(self, config: BenchConfig, folder: Path, context: Context) -> None:
        self._config = config
        self._folder = folder
        self._context = context
        self._ended = threading.Event()

    async def go(self) -> "Results":
        """To its last measurement. Raises the step's cancel."""
        from rl.bench.run import Bench

        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def cancel() -> None:
            loop.call_soon_threadsafe(task.cancel)
            # Whoever called goes on to end our processes when this returns.
            self._ended.wait(self._context.grace_s)

        self._context.on_cancel(cancel)
        self._context.check_cancelled()
        try:
            return await Bench(self._config, self._folder, self._report, resume=True).run()
        except asyncio.CancelledError:
            self._context.check_cancelled()
            raise
        finally:
            self._ended.set()

    def _report(self, progress: "Progress") -> None:
        if progress.found:
            self._context.log(progress.text, "stderr" if progress.failed else "stdout")
        fraction = progress.done / max(1, progress.total)
        self._context.heartbeat({"text": f"{progress.done}/{progress.total} {progress.text}", "fraction": fraction})
