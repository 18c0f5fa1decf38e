"""Where the verbs of `orchestrate spack` run Spack: the options, and one command there at a time.

place_options -> Site -> run | become: here as it is, inside by `orchestrate container launch`
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from bridge.cli.failure import Failure, Unreachable
from container.environment import Environment, EnvironmentProblem
from container.mounts import container_root, parse_mounts
from container.mounts import project_id as project_of
from container.spack_place import Here, Inside

Function = Callable[..., Any]
GRACE_S = 30.0
"""How long what was started may take to end when we are told to."""
_ORCHESTRATE = (sys.executable, "-P", "-m", "bridge.cli.main")


def place_options(command: Function) -> Function:
    """`--here`, `--store`, `--image`, `--mount`, `--project-id`: which Spack works on which store."""
    folder = click.Path(file_okay=False, path_type=Path)
    for decorate in (
        click.option("--project-id", default="", metavar="NAME", help="Whose store it is; by the folder's name."),
        click.option(
            "--mount", "mounts", multiple=True, metavar="HOST:CONTAINER[:ro]", help="A further mount. Repeatable."
        ),
        click.option("--image", default="", metavar="NAME", help="Image with Spack; the standard one by default."),
        click.option("--store", type=folder, help="Folder of this machine that is the store."),
        click.option("--here", is_flag=True, help="Use the Spack in SPACK_ROOT, not that of the standard container."),
    ):
        command = decorate(command)
    return command


@dataclass(frozen=True)
class Site:
    """A place with what a command there needs."""

    place: Here | Inside
    project_id: str
    root: Path
    """Host folder of the project's caches."""
    image: str

    @classmethod
    def of(cls, *, here: bool, store: Path | None, image: str, mounts: Sequence[str], project_id: str) -> "Site":
        """What the options of `place_options` ask for. Raises `Failure`, unreachable where there is no Spack."""
        try:
            project = project_of(project_id or os.environ.get("SYGALDRY_PROJECT_ID", ""), Path.cwd())
            more = tuple(parse_mounts(mounts, Path.cwd()))
        except ValueError as error:
            raise Failure(str(error)) from error
        root = container_root(os.environ, project).absolute()
        if not here:
            return cls(Inside(store, more), project, root, image)
        if image or mounts:
            raise click.UsageError("`--here` starts no container, so `--image` and `--mount` mean nothing")
        try:
            return cls(Here.of(os.environ, store), project, root, "")
        except EnvironmentProblem as error:
            raise Unreachable(str(error)) from error

    @property
    def host_store(self) -> Path:
        """The store as this machine sees it."""
        if isinstance(self.place, Here):
            return Path(self.place.store)
        return self.place.host_store or self.root / "spack_store"

    def run(
        self, command: list[str], environment: Environment | None, *, timeout_s: float, capture: bool = False
    ) -> tuple[int, str]:
        """Run one command in a process group of its own, without stdin; its exit code and, with `capture`, stdout.

        Whatever ends this process early ends the group too. Raises `Failure` when it takes longer than `timeout_s`.
        """
        argv, env = self._call(command, environment, "launch", ["--gpus", "none"])
        handlers = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
        process = subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if capture else None,
            text=True,
            process_group=0,
        )
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            _end(process)
            raise Failure(f"Spack has not ended after {timeout_s:.0f} s", "give it more with `--timeout`") from None
        except BaseException:
            _end(process)
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return process.returncode, output or ""

    def become(self, command: list[str], environment: Environment) -> NoReturn:
        """Become a shell, or a command in one, with the environment activated."""
        entrypoint = ["bash", f"{self.place.entrypoints}/default.sh"] if isinstance(self.place, Here) else []
        argv, env = self._call([*entrypoint, *command], environment, "shell", ["--environment", environment.name])
        env |= {"SYGALDRY_SPACK_ENVIRONMENT": environment.name, "SYGALDRY_SHELL_TITLE": "Spack on this machine"}
        sys.stdout.flush()
        os.execvpe(argv[0], argv, env)

    def _call(
        self, command: list[str], environment: Environment | None, verb: str, options: list[str]
    ) -> tuple[list[str], dict[str, str]]:
        if isinstance(self.place, Here):
            return command, {**os.environ, **self.place.variables(os.environ)}
        mounts = [f"{each.host}:{each.container}{':ro' * each.read_only}" for each in self.place.mounts(environment)]
        options = [*options, "--project-id", self.project_id, *(["--image", self.image] if self.image else [])]
        if verb == "launch":
            # What an image activates by itself may be what is to be locked or built.
            options += ["--env", "SYGALDRY_SPACK_ENVIRONMENT="]
        for mount in mounts:
            options += ["--mount", mount]
        return [*_ORCHESTRATE, "container", verb, *options, "--", *command], dict(os.environ)


def _end(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=GRACE_S)
            return


def _leave(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)
