"""Files that a plan names by path, folder or glob, in an order that is the same everywhere."""

import os
from collections.abc import Iterator
from pathlib import Path

from steps._contract import StepError

MAX_FILES = 20_000
_WILDCARDS = frozenset("*?[")


def matching(folder: Path, pattern: str) -> list[tuple[str, Path]]:
    """Names relative to `folder` (absolute outside it) and paths of the files that `pattern` names, sorted by name.

    A pattern is a file, a folder (all files below it, links followed), or a glob with `*`, `?`, `[]` and `**`. Only
    regular files count. Raises `StepError` for more than 20,000 files.
    """
    path = folder / pattern
    if path.is_file():
        return [(_name(folder, path), path)]
    found: dict[str, Path] = {}
    for candidate in _candidates(path):
        for file in _files(candidate, set()):
            found[_name(folder, file)] = file
            if len(found) > MAX_FILES:
                raise StepError(
                    f"`{pattern}` in `{folder}` names more than {MAX_FILES} files\n\n"
                    "hint: name fewer files, or one file that lists the versions of the others"
                )
    return sorted(found.items())


def _candidates(path: Path) -> Iterator[Path]:
    wild = next((index for index, part in enumerate(path.parts) if _WILDCARDS.intersection(part)), None)
    if wild is None or path.exists():
        yield path
        return
    yield from Path(*path.parts[:wild]).glob("/".join(path.parts[wild:]))


def _files(path: Path, entered: set[tuple[int, int]]) -> Iterator[Path]:
    """The file itself, or all files below a folder; a folder that links lead to twice is entered once."""
    if path.is_file():
        yield path
    elif path.is_dir():
        status = path.stat()
        if (status.st_dev, status.st_ino) not in entered:
            entered.add((status.st_dev, status.st_ino))
            for name in sorted(os.listdir(path)):  # noqa: PTH208 - names, not paths, are sorted
                yield from _files(path / name, entered)


def _name(folder: Path, path: Path) -> str:
    name, above = str(path), f"{folder}/"
    return name[len(above) :] if name.startswith(above) else name
