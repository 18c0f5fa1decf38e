"""`orchestrate job run`.

options, -- COMMAND -> record, START -> submit (a plan of one step) -> job, run, paths
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

import click

from bridge.cli.connection import CallError, LocalConnection, connect
from bridge.cli.failure import INTERRUPTED, Failure
from bridge.cli.job_lookup import EXIT_CODES, Watcher, ask_of, project_of, project_options, service_of, time_option
from bridge.cli.job_watch import follow_output, print_state
from bridge.cli.options import explained, json_option, service_options
from bridge.cli.run import submit, visible_lines
from bridge.cli.watch import Output
from bridge.job_files import JobFiles
from bridge.job_look import RC_NOT_RUN, document, look
from bridge.jobs import FOREVER_S, HEARTBEAT_S, JobError, JobOptions, JobRecord, new_record, plan_text, records
from bridge.terminal import visible
from container.launch import is_secret


class CommandAfterDashes(click.Command):
    """Takes everything behind the first `--` as it is; what stands before it are options and nothing else."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Set the parameter `command` beside the options."""
        own, command = args, []
        if "--" in args:
            at = args.index("--")
            own, command = args[:at], args[at + 1 :]
        rest = super().parse_args(ctx, own)
        if not command and not ctx.resilient_parsing:
            raise click.UsageError("there is no command\n\nhint: it stands behind `--`: `-- python train.py`", ctx)
        ctx.params["command"] = command
        return rest


@click.command("run", cls=CommandAfterDashes, options_metavar="[OPTIONS] -- COMMAND [ARGUMENT]...")
@click.option("--job", "--job-name", "name", required=True, metavar="NAME", help="What the job is called.")
@project_options
@click.option("--image", envvar="SYGALDRY_IMAGE", default="", help="Image to run; the standard one by default.")
@click.option("--entrypoint", default="run-job", show_default=True, help="Entrypoint that runs the command.")
@click.option("--gpus", metavar="none|all|N", help="N are reserved. By default all with SYGALDRY_GPU=true, else none.")
@click.option("--memory", default="", help="Limit such as `8GiB`.")
@click.option("--cpus", type=click.FloatRange(0), default=0.0, help="Limit of cores; 0 is none.")
@click.option("--network", default="", help="`host` (the default), `none`, `bridge` or the name of a network.")
@click.option(
    "--env",
    "env",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="Variable in the container; without a value, this shell's. HF_TOKEN and addresses with a login go as secrets.",
)
@click.option("--secret", "secrets", multiple=True, metavar="[VARIABLE=]NAME", help="Secret, as a variable.")
@click.option("--mount", "mounts", multiple=True, metavar="HOST:CONTAINER[:ro]", help="Further folder or file.")
@time_option("--timeout", "timeout_s", default=0.0, help="Time limit of an attempt; none by default.")
@click.option("--retries", type=click.IntRange(0, 999), default=0, help="Further attempts when the command fails.")
@time_option("--heartbeat", "heartbeat_s", default=HEARTBEAT_S, help="Time between heartbeats: 30 s.")
@click.option("--wait", "waits", is_flag=True, help="Show the output until the job ends.")
@json_option
@service_options
def run_job(
    name: str,
    project_root: Path | None,
    project_id: str,
    timeout_s: float,
    heartbeat_s: float,
    waits: bool,
    as_json: bool,
    command: list[str],
    address: str | None,
    namespace: str | None,
    task_queue: str | None,
    **options: Any,
) -> int:
    """Start a command as a job; return when it is on its way.

    The command stands behind `--`. Several words are a program and its arguments, kept as they are; a single word is a
    command line for bash: `-- 'make && make test'`.

    Exit code 0: started, 2: not valid or the job goes on already, 3: a service not reached. With --wait that of
    `orchestrate job wait`.
    """
    if heartbeat_s < 1:
        raise Failure(f"`--heartbeat` is {heartbeat_s:g} s, wanted at least 1 s")
    root = (project_root or Path.cwd()).absolute()
    wanted = _options(timeout_s=timeout_s or FOREVER_S, **options)
    connection = connect(address, namespace, task_queue)
    if isinstance(connection, LocalConnection):
        service: dict[str, Any] = {"state_dir": str(connection.state.dir)}
    elif wanted.hidden:
        name = min(wanted.hidden)
        raise Failure(
            f"`--env {name}` is a secret, and only the services of this machine can be handed one",
            f"`orchestrate secret set {name}` where the worker runs, and `--secret {name}` here",
        )
    else:
        service = {"address": address, "namespace": namespace, "task_queue": task_queue}
    project = project_of(project_id, root)
    try:
        record = new_record(name, project, command, os.environ, heartbeat_s=heartbeat_s, **service)
    except JobError as error:
        raise Failure(str(error)) from error
    files = JobFiles(record)
    _check_writable(record)
    with explained(connection), files.launching() as is_ours:
        if not is_ours:
            raise Failure(f"another process launches job `{name}` at this moment")
        _check_ended(record)
        files.begin()
        request: dict[str, Any] = {
            "text": plan_text(record, wanted),
            "path": str(root / f"{name}.yaml"),
            "given": {},
            "workflow_id": record.workflow_id,
            "log_dir": None,
            "format": "yaml",
            "secrets": dict(wanted.hidden),
        }
        try:
            started = submit(connection, request, is_new_id=True)
        except (CallError, Failure) as error:
            files.conclude("FAILED", RC_NOT_RUN, f"not launched: {str(error).strip().partition(chr(10))[0]}")
            raise
    for warning in started["warnings"]:
        print(visible_lines(warning), file=sys.stderr)
    _print_started(record, as_json, quiet=waits)
    if not waits:
        return 0
    with explained(service_of(record)) as connection:
        watcher = Watcher(record, connection)
        try:
            follow_output(record, watcher, lines=None, as_json=False, stream=sys.stderr if as_json else sys.stdout)
            kept = watcher.wait()
        except KeyboardInterrupt:
            print(f"job `{name}` goes on; `orchestrate job stop` ends it", file=sys.stderr)
            return INTERRUPTED
    print_state(record, kept, as_json)
    return EXIT_CODES[kept.state]


def _check_writable(record: JobRecord) -> None:
    """`Failure` where a job could not leave its files."""
    try:
        record.log_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(record.log_dir, os.W_OK):
            raise PermissionError(13, os.strerror(13))
    except OSError as error:
        raise Failure(
            f"the container root `{record.root}` cannot be written: {error.strerror}",
            "set SYGALDRY_CONTAINER_ROOT to a folder of your own",
        ) from error


def _check_ended(record: JobRecord) -> None:
    """`Failure` while an earlier run of the job goes on; its launch lock is ours."""
    for other in records([Path(record.root)]):
        if (other.job, other.project_id) == (record.job, record.project_id):
            with explained(service_of(other)) as connection:
                kept = look(other, ask_of(connection), is_launcher=True)
            if kept.goes_on:
                raise Failure(
                    f"job `{record.job}` of project `{record.project_id}` goes on as run `{other.run}`",
                    f"`orchestrate job stop --project-id {record.project_id} --job {record.job}`, or another name",
                )
            return


def _options(
    *,
    image: str,
    entrypoint: str,
    gpus: str | None,
    memory: str,
    cpus: float,
    network: str,
    env: tuple[str, ...],
    secrets: tuple[str, ...],
    mounts: tuple[str, ...],
    timeout_s: float,
    retries: int,
) -> JobOptions:
    gpus = gpus or ("all" if os.environ.get("SYGALDRY_GPU") == "true" else "none")
    if gpus not in ("none", "all") and not (gpus.isdecimal() and int(gpus) > 0):
        raise Failure(f"`--gpus` is `{gpus}`, wanted `none`, `all` or how many")
    variables, named = dict(map(_variable, env)), dict(_pair(each) for each in secrets)
    hidden = {name: value for name, value in variables.items() if is_secret(name, value)}
    if taken := sorted(hidden.keys() & {*named, *named.values()}):
        raise Failure(
            f"`--env {taken[0]}` becomes a secret of that name, which `--secret` names too", "leave one of them away"
        )
    return JobOptions(
        image=image,
        entrypoint=entrypoint,
        env={name: value for name, value in variables.items() if name not in hidden},
        secrets=named,
        hidden=hidden,
        mounts=[_absolute(each) for each in mounts],
        gpus=gpus,
        memory=memory,
        cpus=cpus,
        network=network,
        timeout_s=timeout_s,
        retries=retries,
    )


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or (not equals and name not in os.environ):
        raise Failure(f"got `--env {text}`, wanted `NAME=VALUE`, or the name of a variable that is set here")
    return name, value if equals else os.environ[name]


def _pair(text: str) -> tuple[str, str]:
    variable, _, name = text.rpartition("=")
    return variable or name, name


def _absolute(mount: str) -> str:
    """A mount whose host path starts at the current directory."""
    found = re.fullmatch(r"([^:]+)(:/[^:]*(:ro|:rw)?)", mount)
    if found is None:
        raise Failure(f"got `--mount {mount}`, wanted `HOST:/CONTAINER`, or that with `:ro`")
    return f"{Path.cwd() / Path(found[1]).expanduser()}{found[2]}"


def _print_started(record: JobRecord, as_json: bool, *, quiet: bool) -> None:
    if as_json:
        if not quiet:
            Output(as_json=True).print_json(document(record, JobFiles(record).read()))
        return
    files = JobFiles(record)
    rows = {
        "job": record.job,
        "project": record.project_id,
        "run": record.run,
        "status": files.status,
        "events": files.events,
        "log": files.raw_log,
        "pid": files.pid,
        "workflow": record.workflow_id,
    }
    stream = sys.stderr if quiet else sys.stdout
    print("\n".join(f"{name:<9}{visible(value)}" for name, value in rows.items()), file=stream, flush=True)
