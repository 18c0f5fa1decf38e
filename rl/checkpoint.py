"""Checkpoints of a run: whole or not there, and found again by the number of updates they hold.

    <folder>/checkpoints/update-00000020/{state.json, trainer/...}

A checkpoint is made in a hidden folder beside the others and renamed when all of it is on the disk. `state.json` is a
`RunState` (data cursor, finished groups, ledger, counts); `trainer/` is what `Trainer.save` wrote: model, optimizer,
random state. A process that is killed at any moment leaves the older checkpoints as they are.
"""

import os
import re
import shutil
from pathlib import Path

from rl.ledger import RunState
from rl.stack import Trainer

STATE, TRAINER = "state.json", "trainer"
_NAME = re.compile(r"update-(\d{8})")
_KEPT = 2
"""The newest checkpoints stay, in case somebody reads the last but one."""


class Checkpoints:
    """The checkpoints in the folder of a run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "checkpoints"

    def newest(self) -> Path | None:
        """The checkpoint with the most updates, None where there is none."""
        return max(self._all(), default=None)

    async def save(self, state: RunState, trainer: Trainer) -> Path:
        """A checkpoint of `state`, and of the trainer as it is now. Raises `PartLost` and OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in self._folder.glob(".update-*"):
            shutil.rmtree(left)
        name = f"update-{state.update:08d}"
        made = self._folder / f".{name}"
        (made / TRAINER).mkdir(parents=True)
        await trainer.save(str(made / TRAINER))
        if not any((made / TRAINER).iterdir()):
            raise OSError(
                f"the trainer has saved to `{made / TRAINER}`, but nothing is there: its machine does not see this "
                "folder\n\nhint: a folder of the run that all machines share"
            )
        (made / STATE).write_text(state.model_dump_json())
        _sync(made)
        whole = self._folder / name
        if whole.exists():
            shutil.rmtree(made)
        else:
            made.rename(whole)
            _sync_entry(self._folder)
        for old in sorted(self._all())[:-_KEPT]:
            shutil.rmtree(old)
        return whole

    def _all(self) -> list[Path]:
        return [found for found in self._folder.glob("update-*") if _NAME.fullmatch(found.name)]


def read_state(checkpoint: Path) -> RunState:
    """The run's state in a checkpoint."""
    return RunState.model_validate_json((checkpoint / STATE).read_bytes())


def trainer_folder(checkpoint: Path) -> str:
    """The trainer's files in a checkpoint."""
    return str(checkpoint / TRAINER)


def _sync(folder: Path) -> None:
    """Bring all files and folders in `folder` to the disk, before a rename says that they are whole."""
    for found in folder.rglob("*"):
        _sync_entry(found)
    _sync_entry(folder)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
