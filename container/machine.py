"""A machine as a diagnosis looks at it: programs that are run, files that are read, nothing that is changed.

`ThisMachine` is the real one; `RecordedMachine` answers from what was seen elsewhere.
"""

import fnmatch
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol


class Ran(NamedTuple):
    """What a program said."""

    code: int
    output: str
    errors: str = ""


class Machine(Protocol):
    """What can be asked of a machine."""

    def run(self, *argv: str) -> Ran | None:
        """Run a program that changes nothing; None when there is no such program."""

    def read(self, path: str) -> str | None:
        """Content of a file; None when it cannot be read."""

    def find(self, pattern: str) -> list[str]:
        """Paths that match a pattern with `*` and `[...]`, sorted."""

    def may_use(self, path: str) -> bool:
        """Whether this user may read and write `path`."""


@dataclass(frozen=True)
class ThisMachine:
    """The machine this process runs on."""

    timeout_s: float = 30.0
    """A driver that hangs makes its programs hang; they are ended after this."""

    def run(self, *argv: str) -> Ran | None:
        """Run a program; one that hangs ends with code 124."""
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=self.timeout_s,
                env={**os.environ, "LC_ALL": "C.UTF-8"},
            )
        except OSError:
            return None
        except subprocess.TimeoutExpired:
            return Ran(124, "", f"`{argv[0]}` did not end within {self.timeout_s:g} s")
        return Ran(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))

    def read(self, path: str) -> str | None:
        """Content of a file."""
        try:
            return Path(path).read_text(errors="replace")
        except OSError:
            return None

    def find(self, pattern: str) -> list[str]:
        """Paths that match an absolute pattern."""
        return sorted(str(path) for path in Path("/").glob(pattern.lstrip("/")))

    def may_use(self, path: str) -> bool:
        """Whether this user may read and write `path`."""
        return os.access(path, os.R_OK | os.W_OK)


@dataclass(frozen=True)
class RecordedMachine:
    """A machine that was seen before: `commands` by their argument lists, joined by spaces, and `files` by path."""

    commands: Mapping[str, Ran] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    forbidden: frozenset[str] = frozenset()
    """Paths that exist and that the user may not use."""

    def run(self, *argv: str) -> Ran | None:
        """What the program said then."""
        return self.commands.get(" ".join(argv))

    def read(self, path: str) -> str | None:
        """What the file held then."""
        return self.files.get(path)

    def find(self, pattern: str) -> list[str]:
        """Recorded paths that match; `*` stays within one folder."""
        depth = pattern.count("/")
        return sorted(path for path in self.files if path.count("/") == depth and fnmatch.fnmatchcase(path, pattern))

    def may_use(self, path: str) -> bool:
        """Whether the path was there and usable."""
        return path in self.files and path not in self.forbidden
