"""Container jobs: a command under a name, run as a plan of one `container_job` step.

    orchestrate job run -> JobRecord (on disk) -> plan -> the workflow of every plan
                              |<- job_files: status line, events, raw log    <- job_keeper, in the worker
                              '------------------------------------------    <- job_look, whoever asks

All of a job lies in its project's container root: it outlives the services, and the state directory.
"""

import json
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from container.mounts import container_root
from steps._files import file_name, write_whole

State = Literal["START", "PROGRESS", "DONE", "FAILED", "STOPPED", "LOST"]
"""START: launched, no process yet. STOPPED: ended because somebody asked. LOST: nobody will ever finish it."""
GOING_ON = ("START", "PROGRESS")
STEP_ID = "job"
HEARTBEAT_S = 30.0
FOREVER_S = 365 * 86_400
"""Time limit of a job that was given none, in seconds."""
_RECORD = "job.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_RUN = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}")
_UNSAFE_IN_YAML = re.compile("[\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]")


class JobError(Exception):
    """What was asked of a job cannot be."""


@dataclass(frozen=True)
class JobRecord:
    """One run of a job, written before it is launched and never changed."""

    job: str
    project_id: str
    run: str
    """`<date>-<time>-<digits>`: tells the runs of a job apart."""
    root: str
    """The project's container root on this machine."""
    command: list[str]
    """One word is a command line for bash, several are a program and its arguments."""
    created_at: float
    """Unix time, seconds."""
    heartbeat_s: float = HEARTBEAT_S
    state_dir: str = ""
    """State directory of the services that run it; empty for a Temporal server elsewhere."""
    address: str | None = None
    namespace: str | None = None
    task_queue: str | None = None

    @property
    def workflow_id(self) -> str:
        """Of this run alone."""
        return f"job-{self.project_id}-{self.job}-{self.run}"

    @property
    def log_dir(self) -> Path:
        """Root of the step's logs."""
        return _log_dir(Path(self.root))

    @property
    def folder(self) -> Path:
        """Where this record and the run's logs are."""
        return self.log_dir / file_name(self.workflow_id)

    def write(self) -> None:
        """Keep it. `OSError` when that cannot be."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / _RECORD, json.dumps(asdict(self), indent=1), mode=0o600)


@dataclass(frozen=True)
class JobOptions:
    """How a job runs."""

    image: str = ""
    entrypoint: str = "run-job"
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict)
    """Environment variable -> name of the secret."""
    hidden: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Environment that no record may show: each is a secret of its name, whose value travels beside the plan."""
    mounts: Sequence[str] = ()
    gpus: str = "none"
    """`none`, `all`, or how many to reserve."""
    memory: str = ""
    cpus: float = 0
    network: str = ""
    timeout_s: float = FOREVER_S
    """Of one attempt."""
    retries: int = 0
    """Further attempts when the command fails."""


def new_record(job: str, project_id: str, command: Sequence[str], env: Mapping[str, str], **more: Any) -> JobRecord:
    """A record of now; nothing is written yet. Raises `JobError` for names and words that cannot be."""
    check_name("job", job)
    check_name("project id", project_id)
    if _RUN.fullmatch(job[-20:]):
        raise JobError(f"job name `{job}` ends like the name of a run\n\nhint: leave `{job[-20:]}` away")
    for word in command:
        if "\0" in word or any("\ud800" <= letter <= "\udfff" for letter in word):
            raise JobError(f"the command has a word that is not UTF-8 text: {word!r}")
    return JobRecord(
        job=job,
        project_id=project_id,
        run=f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}",
        root=str(container_root(env, project_id).absolute()),
        command=list(command),
        created_at=time.time(),
        **more,
    )


def check_name(what: str, name: str) -> None:
    """Raise `JobError` unless `name` can be part of a file name whatever stands around it."""
    if not _NAME.fullmatch(name):
        raise JobError(
            f"{what} is `{name}`, wanted a letter or digit, then letters, digits, `.`, `_` or `-`, at most 80 in all"
        )


def plan_text(record: JobRecord, options: JobOptions) -> str:
    """The job as the text of a plan. Nothing in it is a template."""
    block: dict[str, Any] = {
        "command": _command_line(record.command),
        "project_id": record.project_id,
        "entrypoint": options.entrypoint,
        "env": dict(options.env),
        "mounts": list(options.mounts),
        "gpu": options.gpus != "none",
        "image": options.image,
        "memory": options.memory,
        "cpus": options.cpus,
        "network": options.network,
    }
    step: dict[str, Any] = {
        "id": STEP_ID,
        "name": record.job,
        "type": "container_job",
        "env": _literal({"SYGALDRY_CONTAINER_ROOT": record.root}),
        "secrets": {**options.secrets, **{name: name for name in options.hidden}},
        "timeout_seconds": options.timeout_s,
        "retry": {"max_attempts": options.retries + 1},
        "container_job": {name: _literal(value) for name, value in block.items() if value},
    }
    if options.gpus not in ("none", "all"):
        step["resources"] = {"gpus": int(options.gpus)}
    plan = {"name": record.job, "log_dir": str(record.log_dir), "steps": [step]}
    # JSON is YAML, but for a few letters that YAML takes for the end of a line or for none at all.
    text = json.dumps(plan, ensure_ascii=False)
    return _UNSAFE_IN_YAML.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def records(roots: Sequence[Path]) -> list[JobRecord]:
    """Every run of every job under these container roots, the newest first."""
    found = [record for root in roots for path in _log_dir(root).glob(f"*/{_RECORD}") for record in _read(path)]
    return sorted(found, key=lambda record: (-record.created_at, record.run))


def read_record(log_dir: str, workflow_id: str) -> JobRecord | None:
    """The record of the run with these logs; None for a run that is no job's."""
    return next(_read(Path(log_dir, file_name(workflow_id), _RECORD)), None)


def known_roots(env: Mapping[str, str]) -> list[Path]:
    """The container roots of every project, as `env` says where they are."""
    if env.get("SYGALDRY_CONTAINER_ROOT"):
        return [container_root(env, "")]
    folder = container_root(env, "any").parent
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _log_dir(root: Path) -> Path:
    return root / "logs" / "runs"


def _read(path: Path) -> Iterator[JobRecord]:
    try:
        yield JobRecord(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return


def _command_line(command: Sequence[str]) -> str:
    """For bash. What would begin a template is split into two quoted texts, which bash joins again."""
    words = ["bash", "-c", *command] if len(command) == 1 else command
    return shlex.join(words).replace("${{", "$''{{")


def _literal(value: Any) -> Any:
    """A value in which nothing is a template."""
    if isinstance(value, str):
        return value.replace("${{", "${{ '${{' }}")
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return {name: _literal(item) for name, item in value.items()} if isinstance(value, dict) else value
