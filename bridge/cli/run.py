"""`orchestrate PLAN.yaml`: start a plan and watch it to its end."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from bridge.cli.connection import CallError, Connection, LocalConnection, Lost
from bridge.cli.failure import Failure
from bridge.cli.options import connected, json_option, service_options
from bridge.cli.watch import Output, watch
from bridge.terminal import visible

LONGEST_PLAN = 32 * 1024 * 1024
"""Bytes read of a plan file; the reader's own limit is lower and has the better message."""

OLD_FLAGS = ("plan", "workflow-id", "task-queue", "address", "namespace", "log-dir", "input")
OLD_SPELLINGS = {f"-{name}": f"--{name}" for name in OLD_FLAGS}
"""Go's flags have one dash."""


class RunCommand(click.Command):
    """Accepts long options with one dash, as the original did."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Spell the old flags as ours, then parse."""
        return super().parse_args(ctx, [_modern(argument) for argument in args])


@click.command("run", cls=RunCommand)
@click.argument("plan", required=False, type=click.Path(path_type=Path))
@click.option("-p", "--param", "params", multiple=True, metavar="NAME=VALUE", help="A param; `@FILE` is --params FILE.")
@click.option("--params", "params_file", metavar="FILE", help="Params from a JSON object in FILE; `-` is stdin.")
@click.option("--workflow-id", help="Name of the run; by default the plan's name with time and a few digits.")
@click.option("--log-dir", type=click.Path(path_type=Path), help="Root of the logs.")
@click.option("--detach", is_flag=True, help="Start the run and leave it alone.")
@click.option("--quiet", is_flag=True, help="Show nothing but what failed.")
@click.option("--plan", "plan_option", type=click.Path(path_type=Path), hidden=True)
@click.option("--input", "steps_json", type=click.Path(path_type=Path), help="An old JSON list of steps, run in order.")
@json_option
@service_options
def run(
    plan: Path | None,
    params: tuple[str, ...],
    params_file: str | None,
    workflow_id: str | None,
    log_dir: Path | None,
    detach: bool,
    quiet: bool,
    plan_option: Path | None,
    steps_json: Path | None,
    as_json: bool,
    **service: Any,
) -> int:
    """Run a plan and watch it to its end.

    `run` may be left out. Exit code 0: succeeded, 1: failed, 2: not valid, 3: a service not reached, 130: cancelled.
    Ctrl-C asks the run to cancel; a second one lets go of it.
    """
    files = [file for file in (plan, plan_option, steps_json) if file is not None]
    if len(files) != 1:
        raise click.UsageError(f"got {len(files)} plans, wanted one\n\nhint: orchestrate PLAN.yaml")
    path = files[0].absolute()
    text = read_plan_file(path)
    request: dict[str, Any] = {
        "text": text,
        "path": str(path),
        "given": given_params(params, params_file),
        "workflow_id": workflow_id,
        "log_dir": str(log_dir.absolute()) if log_dir else None,
        "format": "json" if steps_json or _is_old_list(path, text) else "yaml",
    }
    if default_log_dir := os.environ.get("TEMPORAL_LOG_DIR"):
        request["default_log_dir"] = str(Path(default_log_dir).absolute())
    if ray_address := os.environ.get("RAY_ADDRESS"):
        request["ray_address"] = ray_address
    output = Output(as_json=as_json, quiet=quiet)
    with connected(service) as connection:
        if isinstance(connection, LocalConnection) and not connection.is_up():
            check_here(request)
            connection.ensure()
        started = submit(connection, request)
        return follow(connection, started, output, detach)


def follow(connection: Connection, started: dict[str, Any], output: Output, detach: bool) -> int:
    """Watch a run that was just started, unless it is to be left alone."""
    for warning in started["warnings"]:
        print(visible_lines(warning), file=sys.stderr)
    workflow_id, run_id = started["workflow_id"], started["run_id"]
    if not detach:
        if not output.quiet:
            stream = sys.stderr if output.as_json else sys.stdout
            print(f"plan `{visible(started['plan'])}` runs as {visible(workflow_id)}", file=stream, flush=True)
        return watch(connection, workflow_id, run_id, output)
    if output.as_json:
        output.print_json(started)
    elif output.quiet:
        print(visible(workflow_id))
    else:
        print(f"plan `{visible(started['plan'])}` runs as {visible(workflow_id)}")
        print(f"watch it with: orchestrate attach {visible(workflow_id)}")
    return 0


def submit(connection: Connection, request: dict[str, Any], *, is_new_id: bool = False) -> dict[str, Any]:
    """Start the plan once, whatever becomes of the connection meanwhile.

    `is_new_id`: the workflow id that the request brings was made for it, so that no other run has it.
    """
    given_id = None if is_new_id else request["workflow_id"]
    request = {**request, "workflow_id": request["workflow_id"] or new_workflow_id(Path(request["path"]).stem)}
    was_lost = False
    while True:
        try:
            return call_with_secrets(connection, "submit", request)
        except Lost:
            # The id is ours alone: if the first request did start the run, the second one meets it.
            if was_lost or given_id:
                raise
            was_lost = True
        except CallError as error:
            if error.kind == "RunConflict" and was_lost:
                key = {"workflow_id": request["workflow_id"], "run_id": None}
                progress = connection.call("progress", **key, since=0, wait_s=0.0)
                return {**progress, "warnings": []}
            raise


def call_with_secrets(connection: Connection, method: str, request: dict[str, Any]) -> dict[str, Any]:
    """A call that starts a run; asked for the plan's secrets, it says which of them this process's environment has.

    None is said of the others: they may be stored, or known to the worker.
    """
    try:
        started: dict[str, Any] = connection.call(method, **request)
    except CallError as error:
        if error.kind != "SecretsNeeded":
            raise
        secrets = {name: os.environ.get(name) for name in error.names}
        started = connection.call(method, **{**request, "secrets": {**request.get("secrets", {}), **secrets}})
    return started


def new_workflow_id(stem: str) -> str:
    """`<plan file>-<date>-<time>-<digits>`."""
    return f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"


def check_here(request: dict[str, Any]) -> None:
    """Check the plan in this process, so that nothing is started for one that is not valid."""
    from bridge.params import resolve_params
    from bridge.problems import PlanError
    from bridge.reader import read_plan_text, read_steps_json_text

    read = read_steps_json_text if request["format"] == "json" else read_plan_text
    try:
        resolve_params(read(request["text"], Path(request["path"])).plan, request["given"])
    except PlanError as error:
        raise CallError("PlanError", str(error)) from error


def _is_old_list(path: Path, text: str) -> bool:
    if path.suffix != ".json":
        return False
    from bridge.reader import is_old_list

    return is_old_list(text)


def read_plan_file(path: Path) -> str:
    """The text of a plan file; `Failure` with the nearest name when there is none."""
    try:
        with path.open("rb") as file:
            return file.read(LONGEST_PLAN).decode()
    except FileNotFoundError as error:
        raise Failure(f"there is no plan `{path}`", _nearest_file(path)) from error
    except UnicodeDecodeError as error:
        raise Failure(f"plan `{path}` is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise Failure(f"cannot read plan `{path}`: {error.strerror}") from error


def given_params(params: tuple[str, ...], params_file: str | None) -> dict[str, str]:
    """Params by name as texts; those of `-p NAME=VALUE` win over those of a file."""
    files = [param[1:] for param in params if param.startswith("@")] + ([params_file] if params_file else [])
    given: dict[str, str] = {}
    for file in files:
        given.update(_params_of(file))
    for param in params:
        name, equals, value = param.partition("=")
        if param.startswith("@"):
            continue
        if not equals or not name:
            raise Failure(f"got param `{param}`, wanted `NAME=VALUE`", f"-p {name or 'name'}=value")
        given[name] = value
    return given


def _params_of(file: str) -> dict[str, str]:
    try:
        values = json.loads(sys.stdin.read() if file == "-" else Path(file).read_text())
    except OSError as error:
        raise Failure(f"cannot read params from `{file}`: {error.strerror}") from error
    except ValueError as error:
        raise Failure(f"params in `{file}` are not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise Failure(f"params in `{file}` are {type(values).__name__}, wanted a JSON object of names and values")
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def visible_lines(text: str) -> str:
    """A text of several lines made harmless for a terminal."""
    return "\n".join(visible(line) for line in text.splitlines())


def _modern(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return OLD_SPELLINGS.get(name, name) + equals + value


def _nearest_file(path: Path) -> str:
    import difflib

    from bridge.cli.main import GROUPS

    plans = [str(file.name) for pattern in ("*.yaml", "*.yml") for file in path.parent.glob(pattern)]
    commands = [name for names in GROUPS.values() for name in names]
    near = difflib.get_close_matches(path.name, [*commands, *plans], n=1)
    return f"did you mean `{near[0]}`?" if near else "`orchestrate --help` lists the commands"


COMMANDS = (run,)
