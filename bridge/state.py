"""The state directory: where the local services keep what must outlive them, and the names of the files in it.

`$ORCHESTRATE_HOME`, else `$XDG_STATE_HOME/orchestrate`, else `~/.local/state/orchestrate`; mode 0700.
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MARKER = "ORCHESTRATE_STATE_DIR"
"""Environment variable that every process of the local services carries; its value is the state directory."""

LONGEST_SOCKET_PATH = 100
"""Bytes; the kernel's limit for a Unix socket is 107."""


class StateError(Exception):
    """The state directory cannot be used."""


@dataclass(frozen=True)
class State:
    """Paths inside one state directory. Nothing is created before `create`."""

    dir: Path

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "State":
        """The state directory this user's environment asks for."""
        if home := environment.get("ORCHESTRATE_HOME"):
            return cls(Path(home).expanduser().resolve())
        if xdg := environment.get("XDG_STATE_HOME"):
            return cls(Path(xdg).expanduser().resolve() / "orchestrate")
        return cls(Path.home() / ".local" / "state" / "orchestrate")

    def create(self) -> "State":
        """Make the directories (0700). `StateError` when one belongs to somebody else or cannot be made."""
        for path in (self.dir, self.logs_dir, self.secrets_dir, self.ray_token_file.parent):
            private_dir(path)
        if self.sockets_dir != self.dir:
            private_dir(self.sockets_dir.parent, may_be_link=False)
            private_dir(self.sockets_dir)
        return self

    @property
    def key(self) -> str:
        """Short name of this state directory for places outside it."""
        import hashlib

        return hashlib.sha256(os.fsencode(self.dir)).hexdigest()[:12]

    @property
    def sockets_dir(self) -> Path:
        """The state directory itself, or a private one with a short path when its path is too long for a socket."""
        if len(os.fsencode(self.dir / "supervisor.sock")) <= LONGEST_SOCKET_PATH:
            return self.dir
        return self.short_dir / self.key

    @property
    def short_dir(self) -> Path:
        """A directory with a short path. The same in every session of this user, unlike `$XDG_RUNTIME_DIR`."""
        return Path("/tmp") / f"orchestrate-{os.getuid()}"

    @property
    def supervisor_socket(self) -> Path:
        """Takes one JSON line, answers one; see `supervisor`."""
        return self.sockets_dir / "supervisor.sock"

    @property
    def gateway_socket(self) -> Path:
        """Made by the worker when it is ready to take work."""
        return self.sockets_dir / "gateway.sock"

    @property
    def lock_file(self) -> Path:
        """Held by the one living supervisor."""
        return self.dir / "supervisor.lock"

    @property
    def services_file(self) -> Path:
        """Ports and processes of the services, so that a new supervisor finds them again."""
        return self.dir / "services.json"

    @property
    def temporal_db(self) -> Path:
        """SQLite file of the local Temporal server."""
        return self.dir / "temporal.db"

    @property
    def logs_dir(self) -> Path:
        """Logs of the services themselves."""
        return self.dir / "logs"

    @property
    def run_log_dir(self) -> Path:
        """Root of the logs of runs whose plan names none."""
        return self.dir / "runs"

    @property
    def secrets_dir(self) -> Path:
        """One file per secret."""
        return self.dir / "secrets"

    @property
    def cache_file(self) -> Path:
        """Results of cached steps."""
        return self.dir / "cache.db"

    @property
    def ray_token_file(self) -> Path:
        """The token that guards the ports of the local Ray."""
        return self.dir / "ray" / "auth_token"

    @property
    def ray_temp_dir(self) -> Path:
        """Ray's own files. Outside, because Ray puts sockets with long names below it."""
        return self.short_dir / f"ray-{self.key}"

    def log_file(self, name: str) -> Path:
        """Log of the service called `name`."""
        return self.logs_dir / f"{name}.log"


def private_dir(path: Path, *, may_be_link: bool = True) -> Path:
    """Make `path` a directory that only this user can enter; `StateError` when that cannot be."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat() if may_be_link else path.lstat()
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError("it is not a directory")
        if status.st_uid != os.getuid():
            raise PermissionError(f"it belongs to user {status.st_uid}, wanted {os.getuid()}")
        if stat.S_IMODE(status.st_mode) != 0o700:
            path.chmod(0o700)
    except OSError as error:
        raise StateError(
            f"cannot use `{path}`: {error}\n\nhint: set `ORCHESTRATE_HOME` to a directory of your own"
        ) from error
    return path


def write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read (0600), whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def append_private(path: Path) -> BinaryIO:
    """Open a log that only this user can read; two writers do not overwrite each other."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")
