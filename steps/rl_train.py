"""Train a language model by asynchronous RL; a retry, or the same step later, goes on from the last checkpoint.

Params -> RunConfig -> rl.train (in this process) -> the folder of the run -> Outputs
"""

import asyncio
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from rl.config import RunConfig
from rl.evaluation import Interval
from steps import Context, Frozen, PlanPath, StepError
from steps import Outputs as StepOutputs

if TYPE_CHECKING:
    from rl.metrics import RunEvent
    from rl.run_folder import RunSummary
    from rl.train import RunResult


class Params(RunConfig, Frozen):
    folder: PlanPath
    """Folder of the run. A run that is there already is gone on with, up to `updates`."""


class Outputs(Frozen):
    folder: str
    """Absolute path of the run's folder."""
    checkpoint: str
    """Folder of the last checkpoint."""
    model: str
    """Folder of the trained model in it, as transformers and vLLM load it."""
    updates: int
    """Updates that the run has done, those of earlier attempts included."""
    mean_reward: float | None
    """Of the last update."""
    accuracy: float | None
    """On held-out prompts, by the last weights; 0 to 1."""
    accuracy_interval: Interval | None
    """Its 95 % confidence interval."""
    trained_tokens: int
    wasted_tokens: int


def run(params: Params, context: Context) -> StepOutputs:
    from rl.loop import Diverged
    from rl.run_folder import run_summary
    from rl.stack import ParityError
    from rl.train import RunBusy, RunRefused

    folder = context.plan_dir / params.folder
    config = RunConfig.model_validate(params.model_dump(exclude={"folder"}))
    try:
        if not _is_done(config, folder):
            asyncio.run(_Run(config, folder, context).go())
    except RunBusy:
        # Whoever it is will be gone; the step may be tried again.
        raise
    except (RunRefused, FileNotFoundError) as error:
        raise StepError(str(error)) from error
    except (ParityError, Diverged) as error:
        # The same again would give the same.
        raise StepError(f"{type(error).__name__}: {error}") from error
    summary: RunSummary = run_summary(folder)
    return summary.model_dump(mode="json", exclude={"finished", "evaluated_version"})


def _is_done(config: RunConfig, folder: Path) -> bool:
    """Whether the folder has all that is wanted, so that nothing needs to be started."""
    from rl.run_folder import read_config, run_summary

    if read_config(folder) != config:
        return False
    try:
        summary = run_summary(folder)
    except FileNotFoundError:
        return False
    return summary.finished and summary.evaluated_version == config.updates


class _Run:
    """One run, which stops with a checkpoint when the step is to end."""

    def __init__(self, config: RunConfig, folder: Path, context: Context) -> None:
        self._config = config
        self._folder = folder
        self._context = context
        self._ended = threading.Event()

    async def go(self) -> None:
        """To its last update. Raises what `rl.train.train` raises, and the step's cancel."""
        from rl.train import train

        loop, stop = asyncio.get_running_loop(), asyncio.Event()

        def cancel() -> None:
            loop.call_soon_threadsafe(stop.set)
            # Whoever called goes on to end our processes when this returns.
            self._ended.wait(self._context.grace_s)

        self._context.on_cancel(cancel)
        self._context.check_cancelled()
        self._context.heartbeat({"text": "starting", "fraction": 0.0})
        try:
            result: RunResult = await train(self._config, str(self._folder), True, self._report, stop=stop)
        finally:
            self._ended.set()
        if result.updates < self._config.updates:
            self._context.log(f"stopped after update {result.updates}; a retry goes on from there")
            self._context.check_cancelled()

    def _report(self, event: "RunEvent") -> None:
        from rl.event_line import event_line
        from rl.metrics import Notice, UpdateRecord

        self._context.log(event_line(event, self._config.updates), "stderr" if isinstance(event, Notice) else "stdout")
        if isinstance(event, UpdateRecord):
            done = event.train.update + 1
            text = f"update {done}/{self._config.updates}, reward {event.train.mean_reward:.3f}"
            self._context.heartbeat({"text": text, "fraction": done / self._config.updates})
