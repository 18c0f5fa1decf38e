"""What it costs that a process dies: a real run, one of its roles killed (SIGKILL) while it goes on.

measure_recovery -> rl.bench.recovery_run, in a process of its own: train, kill, train on -> Recovery
"""

import asyncio
import tempfile
from pathlib import Path
from typing import Literal

from rl.bench.cells import run_config
from rl.bench.child import ChildFailed, measure_apart
from rl.bench.config import BenchConfig
from rl.bench.results import CellKey, Recovery
from rl.config import RunConfig
from rl.types import Frozen

Killed = Literal["trainer", "generator"]

_CHECKPOINT_EVERY = 4
_KILL_AFTER = 6
"""The update whose weights are live when the process is killed: the last checkpoint is three updates old."""
_UPDATES = 14


class RecoveryRequest(Frozen):
    """What a child is to measure."""

    config: RunConfig
    killed: Killed
    kill_after: int
    """Number of the update that is reported when the kill comes."""
    folder: str
    """Where the run may live."""


def can_be_killed(stack: str, killed: Killed) -> bool:
    """Whether the role has a process that is not the run's own: on the stack `local`, only the trainer has."""
    return stack != "local" or killed == "trainer"


def measure_recovery(config: BenchConfig, stack: str, killed: Killed, seed: int, folder: Path) -> Recovery:
    """What happened, with the reason in `error` where there are no numbers. What the run says is kept in `folder`."""
    nothing = Recovery(
        stack=stack,
        killed=killed,
        seed=seed,
        next_update_s=0.0,
        back_s=0.0,
        samples_lost=0,
        samples_doubled=0,
        repeated_updates=0,
    )
    if not can_be_killed(stack, killed):
        return nothing.model_copy(update={"error": f"stack `{stack}` has its {killed} in the process of the run"})
    try:
        with tempfile.TemporaryDirectory(prefix="orchestrate-recovery-") as temporary:
            request = RecoveryRequest(
                config=recovery_config(config, stack, seed),
                killed=killed,
                kill_after=_KILL_AFTER,
                folder=temporary,
            )
            apart = measure_apart("rl.bench.recovery_run", request, Recovery, folder / "run", config.cell_timeout_s)
            return asyncio.run(apart)
    except (ChildFailed, OSError) as failure:
        return nothing.model_copy(update={"error": str(failure)})


def recovery_config(config: BenchConfig, stack: str, seed: int) -> RunConfig:
    """The asynchronous cell of the stack, with checkpoints and an end."""
    cell = CellKey(stack=stack, mode="async", num_generators=config.num_generators, max_staleness=config.staleness)
    return run_config(config, cell, seed).model_copy(
        update={"updates": _UPDATES, "checkpoint_every": _CHECKPOINT_EVERY, "evaluation_prompts": 1}
    )
