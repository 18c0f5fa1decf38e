"""Models that were made on this machine: each made once, whichever process asks first, and whole or not at all.

$ORCHESTRATE_CACHE, else $XDG_CACHE_HOME/orchestrate, else ~/.cache/orchestrate
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Where models are kept; may be deleted at any time when nothing runs."""
    if own := os.environ.get("ORCHESTRATE_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "orchestrate"


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder of this name in the cache; where it is missing, `make` fills a temporary one, which then becomes it.

    Who comes while it is made waits for it.
    """
    folder = cache_folder() / "models" / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{name}.lock")):
        if not folder.is_dir():
            partial = folder.with_name(f".{name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            partial.rename(folder)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
