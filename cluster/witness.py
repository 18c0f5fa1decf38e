"""How a node finds out whether it sees the very folder that the worker sees, and not another one of that name.

The same machine compares device and inode, which hold through bind mounts too. Another machine compares inodes and
times of files: a network file system shows the same ones everywhere, a copy of the folder has others.
"""

import itertools
import os
from pathlib import Path

from steps import Frozen
from steps._process import identity

_MOST_ENTRIES = 8


class Witness(Frozen):
    """What the worker sees of a folder."""

    boot_id: str
    """Of the machine's kernel."""
    device: int
    inode: int
    entries: tuple[tuple[str, int, int, int], ...]
    """Name, inode, size and modification time (ns) of some files."""


def look_at(folder: Path) -> Witness | None:
    """The witness of a folder, None when there is none of that name."""
    try:
        status = folder.stat()
        with os.scandir(folder) as found:
            files = sorted(entry.name for entry in itertools.islice(found, 1000) if entry.is_file())[:_MOST_ENTRIES]
    except OSError:
        return None
    entries = [entry for name in files if (entry := _entry(folder, name)) is not None]
    return Witness(boot_id=_boot_id(), device=status.st_dev, inode=status.st_ino, entries=tuple(entries))


def is_here(witness: Witness, folder: Path) -> bool:
    """True when `folder` is the one that was looked at."""
    try:
        status = folder.stat()
    except OSError:
        return False
    if status.st_ino != witness.inode:
        return False
    if witness.boot_id == _boot_id():
        return status.st_dev == witness.device
    # Any one will do: the others may just have been changed, or be remembered by this machine as they were.
    return any(_entry(folder, entry[0]) == entry for entry in witness.entries)


def _entry(folder: Path, name: str) -> tuple[str, int, int, int] | None:
    try:
        status = (folder / name).stat()
    except OSError:
        return None
    return name, status.st_ino, status.st_size, status.st_mtime_ns


def _boot_id() -> str:
    return str(identity()["boot_id"])
