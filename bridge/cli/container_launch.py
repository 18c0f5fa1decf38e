"""`orchestrate container launch`, `shell`, `run`, `sync` and `verify-gpu`: a container in the foreground.

options -> Request -> request.job -> foreground.call_of -> --dry-run prints it, else foreground.execute becomes it
"""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from bridge.cli.container_engine import say
from bridge.cli.failure import Failure

Function = Callable[..., Any]
PROJECT_PROGRAM = ("python3", "/opt/sygaldry/entrypoints/_project.py")
"""What `run` and `sync` start in the container."""

_REPORTS = "/run/sygaldry/reports"
_COMMAND_FIRST = {"allow_interspersed_args": False}
"""Options after the first word of the command are the command's."""


def launch_options(command: Function) -> Function:
    """Options of every verb that starts a container."""
    for decorate in reversed(
        (
            click.option("--image", metavar="NAME", help="Image; $SYGALDRY_IMAGE or the standard image by default."),
            click.option(
                "--project-id", metavar="NAME", help="Whose caches are mounted; by default the workspace's folder name."
            ),
            click.option(
                "--workspace",
                "--repo-root",
                "workspace",
                type=click.Path(exists=True, file_okay=False, path_type=Path),
                default=".",
                help="Folder seen as /workspace; the current one by default.",
            ),
            click.option("--environment", metavar="NAME", help="Spack environment to activate."),
            click.option(
                "--gpus", metavar="WHICH", help="`all`, `none`, how many, or ids: `device=0`, `0,1`, `GPU-...`."
            ),
            click.option("--memory", default="", metavar="SIZE", help="Memory limit, such as `8GiB`."),
            click.option("--cpus", type=click.FloatRange(min=0, min_open=True), help="Limit of CPU cores."),
            click.option(
                "--mount", "mounts", multiple=True, metavar="HOST:CONTAINER[:ro]", help="A further mount. Repeatable."
            ),
            click.option(
                "--port",
                "ports",
                multiple=True,
                metavar="[[ADDRESS:]HOST:]PORT",
                help="Publish a port, on loopback unless told otherwise; leaves the host's network. Repeatable.",
            ),
            click.option(
                "--env",
                "env",
                multiple=True,
                metavar="NAME[=VALUE]",
                help="A variable of the container; without a value, this shell's. Repeatable.",
            ),
            click.option(
                "--secret",
                "secrets",
                multiple=True,
                metavar="NAME",
                help="A secret by name (`orchestrate secret`, else this shell's variable), passed by file. Repeatable.",
            ),
            click.option("--network", metavar="NAME", help="`host` (default), `none`, `bridge` or a network's name."),
            click.option("--name", metavar="NAME", help="Name of the container; a new one by default."),
            click.option(
                "--dry-run", is_flag=True, help="Print the `docker run` line and stop; secrets are not part of it."
            ),
        )
    ):
        command = decorate(command)
    return command


@click.command(context_settings=_COMMAND_FIRST)
@click.option(
    "--entrypoint",
    metavar="NAME",
    envvar="SYGALDRY_ENTRYPOINT",
    default="default",
    show_default=True,
    help="Which of our entrypoints runs.",
)
@launch_options
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def launch(entrypoint: str, command: tuple[str, ...], **given: Any) -> None:
    """Run an entrypoint in a container, in the foreground.

    What follows the options is given to the entrypoint; those that run a program take it as it stands.
    Signals are passed on and the exit code is the container's: 125 when Docker could not start it, 126 and 127 when
    the program in it could not be run. Exit code 2 for what cannot be launched as asked, 3 when no engine answers.

    \b
    orchestrate container launch -- nvidia-smi -L
    orchestrate container launch --entrypoint run-job --gpus 2 --memory 64GiB -- python train.py
    """
    start(entrypoint, command, given)


@click.command(context_settings=_COMMAND_FIRST)
@launch_options
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def shell(command: tuple[str, ...], **given: Any) -> None:
    """Open a shell in the standard container.

    With a COMMAND, run that instead, as the shell would see it.
    """
    start("default", command, given)


@click.command(context_settings=_COMMAND_FIRST)
@launch_options
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def run(command: tuple[str, ...], **given: Any) -> None:
    """Run a repository's command in the standard container.

    It runs in the repository's Python environment, which lies over the Spack view and is made by `sync`, the first time
    by this command. With a wheel of torch or CUDA in it, which would hide the view's, nothing runs (exit code 1).

    \b
    orchestrate container run -- python train.py --epochs 3
    """
    start("run-job", [*PROJECT_PROGRAM, "run", "--", *command], given, of_project=True)


@click.command()
@click.option(
    "--requirements", metavar="FILE", help="Install from FILE of the workspace, not from what the repository declares."
)
@click.option("--extra", "extras", multiple=True, metavar="NAME", help="Extra of the pyproject.toml. Repeatable.")
@click.option("--group", "groups", multiple=True, metavar="NAME", help="Dependency group. Repeatable.")
@launch_options
def sync(requirements: str | None, extras: tuple[str, ...], groups: tuple[str, ...], **given: Any) -> None:
    """Make or update a repository's Python environment.

    It gets what uv.lock, pyproject.toml or requirements.txt says, and lies over the Spack view: torch, JAX and CUDA
    stay the view's. What would need another version of them is refused, with exit code 1.
    """
    options = ["--requirements", requirements] if requirements else []
    options += [word for name in extras for word in ("--extra", name)]
    options += [word for name in groups for word in ("--group", name)]
    start("run-job", [*PROJECT_PROGRAM, "sync", *options], given, of_project=True)


@click.command("verify-gpu")
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON document on stdout.")
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Also write the JSON report there.")
@click.option("--frameworks", metavar="NAMES", help="What to check: `torch`, `jax` or `torch,jax` (default).")
@launch_options
def verify_gpu(as_json: bool, report: Path | None, frameworks: str | None, **given: Any) -> None:
    """Check in a container that torch and JAX compute on its GPUs. Exit code 0 when they do, 1 when not."""
    command = ["--json"] if as_json else []
    command += ["--frameworks", frameworks] if frameworks else []
    if report:
        if not report.absolute().parent.is_dir():
            raise Failure(f"`{report.absolute().parent}` is not a folder")
        command += ["--report", f"{_REPORTS}/{report.name}"]
        given["mounts"] = (*given["mounts"], f"{report.absolute().parent}:{_REPORTS}")
    start("verify-gpu", command, given)


def start(entrypoint: str, command: Sequence[str], given: dict[str, Any], *, of_project: bool = False) -> None:
    """Become the container, or print the call. Does not come back in the first case."""
    import os

    from bridge.cli.container_request import Request
    from container import reaper
    from container.foreground import Terminal, call_of, execute
    from container.launch import LaunchError

    dry_run = given.pop("dry_run")
    request = Request(entrypoint=entrypoint, command=command, of_project=of_project, **given)
    job, engine = request.job(os.environ, may_change=not dry_run)
    try:
        # A line that is pasted belongs to the shell it is pasted into.
        owner = reaper.owner(os.getppid()) if dry_run else reaper.owner()
        call = call_of(job, engine, Terminal.of_this_process(), owner)
        if not dry_run:
            execute(call, os.environ)
    except LaunchError as error:
        raise Failure(str(error)) from error
    click.echo(shlex.join(call.argv))
    if call.secrets:
        say(f"hint: a launch puts the secrets ({', '.join(call.secrets)}) into that file first, and removes it after")


VERBS: tuple[click.Command, ...] = (launch, shell, run, sync, verify_gpu)
