"""One training run, from its config to its last checkpoint: the one place that wires.

RunConfig -> open_stack -> Loop (from the newest checkpoint, again when the trainer was lost) -> RunResult

<folder>/config.json, checkpoints/, metrics.jsonl, evaluations.jsonl, tensorboard/, stacks/ (of stuck phases)
"""

import asyncio
import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path

from rl import stack as seam
from rl.checkpoint import Checkpoints, read_state, trainer_folder
from rl.config import RunConfig
from rl.ledger import Ledger, RunState, Tokens
from rl.loop import Loop, TrainerLost
from rl.metrics import Notice, Report, RunEvent, RunLog
from rl.stack import Stack
from rl.types import Frozen
from rl.watchdog import FOLDER_VARIABLE, Stuck, Watchdog

CONFIG, LOCK = "config.json", ".lock"
_SAME = ("model", "tasks", "seed", "groups_per_update", "group_size", "max_staleness", "rollout")
"""Settings that a resumed run cannot change: the groups in its checkpoint and its ledger were made by them."""
_MOST_LOSSES = 3
"""Times that the trainer may be lost without a new checkpoint in between."""

OpenStack = Callable[[RunConfig, str], AbstractAsyncContextManager[Stack]]


class RunRefused(ValueError):
    """The folder does not fit the run. The argument says why."""


class RunBusy(RunRefused):
    """Another process runs in the folder right now."""


class RunResult(Frozen):
    """A run that is done, or was told to stop."""

    updates: int
    """Fewer than the config's for a run that was told to stop."""
    checkpoint: str
    """Folder of the last checkpoint; the trainer's files are in its `trainer`."""
    ledger: Ledger
    tokens: Tokens


def _silent(event: RunEvent) -> None:
    """Nobody listens."""


async def train(
    config: RunConfig,
    folder: str,
    resume: bool = False,
    report: Report = _silent,
    *,
    stop: asyncio.Event | None = None,
    open_stack: OpenStack = seam.open_stack,
) -> RunResult:
    """Run `config` in `folder` to its last update, and report every event after it is written down.

    Once `stop` is set, the run ends before its next update with a checkpoint, and can be resumed. With `resume` the run
    goes on from the newest checkpoint in the folder, if there is one. Raises `RunRefused`, `RunBusy`, `ParityError`,
    `Diverged`, and `TrainerLost` or `PartLost` for a part that is lost again and again.
    """
    with _alone_in(Path(folder)):
        return await _train(config, Path(folder), resume, report, stop, open_stack)


async def _train(
    config: RunConfig, base: Path, resume: bool, report: Report, stop: asyncio.Event | None, open_stack: OpenStack
) -> RunResult:
    checkpoints = Checkpoints(base)
    newest = checkpoints.newest()
    if newest is not None and not resume:
        raise RunRefused(f"`{base}` has a run of its own already\n\nhint: resume it, or choose another folder")
    _write_config(base, config, newest is not None)
    os.environ[FOLDER_VARIABLE] = str((base / "stacks").absolute())
    state = RunState() if newest is None else read_state(newest)
    log = RunLog(base, report, update=state.update, evaluated=state.evaluated)
    watchdog = Watchdog(config.stuck_after_s, lambda stuck: log(_notice(base, stuck)), base / "stacks")
    try:
        async with open_stack(config, "" if newest is None else trainer_folder(newest)) as stack:
            final = await _run(config, stack, checkpoints, watchdog, log, stop)
    finally:
        await watchdog.close()
        log.close()
        os.environ.pop(FOLDER_VARIABLE, None)
    state = read_state(final)
    return RunResult(updates=state.update, checkpoint=str(final), ledger=state.ledger, tokens=state.tokens)


async def _run(
    config: RunConfig,
    stack: Stack,
    checkpoints: Checkpoints,
    watchdog: Watchdog,
    log: RunLog,
    stop: asyncio.Event | None,
) -> Path:
    """The loop, again from the newest checkpoint for every trainer that was lost."""
    losses, before = 0, -1
    lost_tokens: int | None = None
    while True:
        newest = checkpoints.newest()
        state = RunState() if newest is None else read_state(newest)
        if lost_tokens is not None:
            state = _rolled_back(state, lost_tokens)
            log.rewind(state.update, state.evaluated)
        loop = Loop(config, stack, state, checkpoints, watchdog, log, stop)
        try:
            return await loop.run()
        except TrainerLost as lost:
            newest = checkpoints.newest()
            updates = -1 if newest is None else read_state(newest).update
            losses = losses + 1 if updates == before else 1
            before = updates
            log(Notice(event="trainer_lost", message=f"the trainer is lost: {lost}"))
            if losses > _MOST_LOSSES:
                raise
            lost_tokens = loop.buffer.tokens.generated
            with watchdog.phase("replace", "trainer"):
                await stack.replace_trainer("" if newest is None else trainer_folder(newest))
            log(Notice(event="trainer_replaced", message=f"the trainer is back at update {max(0, updates)}"))


@contextmanager
def _alone_in(base: Path) -> Iterator[None]:
    """Nobody else runs in the folder until the end; the system lets go of it when this process dies."""
    base.mkdir(parents=True, exist_ok=True)
    with (base / LOCK).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunBusy(f"a run goes on in `{base}`\n\nhint: wait for its end, or choose another folder") from None
        yield


def _rolled_back(state: RunState, generated: int) -> RunState:
    """The state of a checkpoint, with what was generated since counted as wasted."""
    tokens = state.tokens
    lost = generated - tokens.generated
    counted = tokens.model_copy(update={"generated": generated, "rolled_back": tokens.rolled_back + lost})
    return state.model_copy(update={"tokens": counted})


def _write_config(base: Path, config: RunConfig, resumed: bool) -> None:
    """Write the config down; for a run that goes on, see that it is the same run."""
    path = base / CONFIG
    if resumed and path.exists():
        old, new = json.loads(path.read_text()), config.model_dump(mode="json")
        changed = [
            f"`{name}` was `{old.get(name)}` and is `{new[name]}`" for name in _SAME if old.get(name) != new[name]
        ]
        if changed:
            raise RunRefused(f"`{base}` has another run: {'; '.join(changed)}\n\nhint: choose another folder")
    beside = path.with_name(f".{CONFIG}")
    beside.write_text(config.model_dump_json(indent=2))
    beside.replace(path)


def _notice(base: Path, stuck: Stuck) -> Notice:
    """The stacks go to a file, and its name to the reader."""
    folder = base / "stacks"
    folder.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix="stuck-", suffix=".txt", delete=False) as file:
        file.write(stuck.stacks)
    return Notice(event="stuck", message=f"{stuck}; the stacks are in `{file.name}`")
