"""A container in the foreground of a terminal or a script: this process becomes `docker run` and ends with its code.

    Job -> call_of -> argv ---> shown by a dry run
                        '-----> execute: secrets written, watch started, exec of that argv

Signals, the terminal's size and the exit code are `docker run`'s own. However this process ends, the container is
removed: by the engine (`--rm`), by the watch beside it, and by the next caller of `reaper.reap` when even that is gone.
"""

import dataclasses
import os
import shutil
import signal
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from container import reaper
from container.command_line import docker_run
from container.launch import SECRETS_IN_CONTAINER, Job, LaunchError, run_options, write_secrets
from container.mounts import Mount

GRACE_S = 10
"""Between SIGTERM and SIGKILL for a container whose launch has been killed."""
KIND_LABEL = "orchestrate.foreground"
"""Label whose value is the entrypoint; by it containers that people started are told from those of steps."""


@dataclass(frozen=True)
class Terminal:
    """How a process is connected to who started it."""

    interactive: bool
    """Somebody may write to stdin."""
    terminal: bool
    """Somebody types there, and reads what is answered."""

    @classmethod
    def of_this_process(cls) -> "Terminal":
        """Stdin is passed on unless it is a device that nobody types at, such as `/dev/null`."""
        try:
            kind = os.fstat(0).st_mode
        except OSError:
            return cls(interactive=False, terminal=False)
        typed = os.isatty(0)
        return cls(interactive=typed or not stat.S_ISCHR(kind), terminal=typed and os.isatty(1))


@dataclass(frozen=True)
class Call:
    """A `docker run` that is ready to be executed."""

    argv: list[str]
    name: str
    """Of the container."""
    secrets: Mapping[str, str] = field(repr=False)


def new_name(project_id: str, entrypoint: str) -> str:
    """A name for a container that no other has."""
    return f"sygaldry-{project_id}-{entrypoint.removesuffix('.sh')}-{os.urandom(4).hex()}"


def call_of(job: Job, engine: Mapping[str, Any], terminal: Terminal, owner: str = "") -> Call:
    """What `execute` will run; `engine` is the engine's `info`. Raises `LaunchError`.

    `owner` is the process the container should not outlive, see `reaper.owner`; this one by default.
    """
    labels = {
        **job.labels,
        reaper.OWNER_LABEL: owner or reaper.owner(),
        KIND_LABEL: job.entrypoint.removesuffix(".sh"),
    }
    secrets, mounts = job.secrets, list(job.mounts)
    if secrets:
        mounts.append(Mount(str(_secrets_file(job.name)), SECRETS_IN_CONTAINER, read_only=True))
    options = run_options(dataclasses.replace(job, labels=labels, mounts=mounts, secrets={}), engine, job.image)
    argv = docker_run(options, interactive=terminal.interactive, terminal=terminal.terminal)
    return Call(argv, job.name, secrets)


def execute(call: Call, env: Mapping[str, str]) -> NoReturn:
    """Become the call: what comes back is its exit code, to whoever waits for this process. Raises `LaunchError`."""
    program = shutil.which("docker", path=env.get("PATH"))
    if program is None:
        raise LaunchError("there is no `docker` program on `PATH`\n\nhint: install Docker's command line")
    try:
        if call.secrets:
            reaper.make_private_folder(call.name)
            write_secrets(_secrets_file(call.name), call.secrets)
    except FileExistsError as error:
        raise LaunchError(
            f"a container `{call.name}` is being started already\n\nhint: give another name with `--name`"
        ) from error
    reaper.start_watch([os.getpid()], call.name, env, GRACE_S)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # Python ignores it; the program that takes our place must not.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # The engine is the one that was asked before, not that of the user's current context.
    context = {} if env.get("DOCKER_HOST") else {"DOCKER_CONTEXT": "default"}
    try:
        os.execve(program, call.argv, {**env, **context})
    except OSError as error:
        raise LaunchError(f"`{program}` cannot be run: {error}") from error


def _secrets_file(name: str) -> Path:
    return reaper.private_folder(name) / "secrets"
