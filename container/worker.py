"""Runs the worker of a Ray actor in an image: what Ray starts instead of Python (`runtime_env.py_executable`).

    raylet -> bash -> this (command(spec)) -> engine: create, start -> `inside.py worker` -> Ray's worker, the actor
                       '- reaper.start_watch: removes the container when this process or the raylet has ended

The container shares the node's network, processes and memory segments, as Ray wants; of its files it sees the session
of Ray, the standard mounts, the secrets that are declared and what else the spec names; of its environment Ray's own
variables and what the node allows.
When the container does not come up, a worker of the host is started in its place, with `REFUSED_VARIABLE` set: its
actor fails with that text, where a worker that never came would be waited for.
"""

import fnmatch
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from container import reaper
from container.engine_socket import EngineError, EngineSocket
from container.mounts import HF_HOME, HOME, Mount, container_root, project_id, standard_mounts

ACTOR_LABEL = "orchestrate.actor"
REFUSED_VARIABLE = "ORCHESTRATE_IMAGE_REFUSED"
"""Why the actor is not in its image, in a worker that stands in for it."""
FOLDER_VARIABLE = "ORCHESTRATE_ACTOR_FOLDER"
"""The actor's folder, in its container."""
UP = "up"
"""File in the actor's folder once it has come up."""
KIT = "/opt/orchestrate/kit"
_SECRETS = "/run/secrets"
_SECRETS_DIR_VARIABLE = "ORCHESTRATE_SECRETS_DIR"
_LEAST_CPUS = 0.25
"""Below this the worker alone would take longer to start than Ray waits."""
_RUNNER = "import sys; sys.path[:1] = [sys.argv.pop(1)]; from container.worker import main; main()"
_PAUSE_S = 1.0
_OF_RAY = "RAY_*"
_NOT_INSIDE = ("RAY_AUTH_TOKEN", "RAY_START_HOOK", "RAY_TMPDIR")


@dataclass(frozen=True)
class WorkerSpec:
    """What the worker of one actor gets; known before Ray has chosen its node among those that fit."""

    actor: str
    image_id: str
    python: str
    """Path of the interpreter in the image."""
    kit: str
    """Folder on the node, see `container.kit`."""
    folder: str
    """The actor's folder on the node; it is made, and seen at the same path."""
    copies: str = ""
    """Folder on the node for copies of plans' folders; the same holds for it."""
    mounts: Sequence[str] = ()
    """Folders of the node that are seen at the same path; the first is also `/workspace`. Missing ones are left out."""
    project: str = ""
    """Whose caches are mounted; by default as the node says, else after the first of `mounts`."""
    root: str = ""
    """Folder of the node that those caches lie in; by default as the node says."""
    secrets: Sequence[str] = ()
    """Names of the secrets it may see, of all that the node has."""
    own_secrets: str = ""
    """Folder of secrets that came with the run, within the node's own; they go before those."""
    cpus: float = 0.0
    """Limit in cores; 0 is none."""
    memory: int = 0
    """Limit in bytes; 0 is none."""
    devices: Sequence[Mapping[str, Any]] = ()
    """GPUs, as the engine's `DeviceRequests`; Ray sets CUDA_VISIBLE_DEVICES to those it has assigned."""

    @property
    def container(self) -> str:
        """Name of the container."""
        return f"orchestrate-{self.actor}"


def command(spec: WorkerSpec, python: str, root: str) -> str:
    """The shell command Ray runs with its worker's script and arguments appended; `root` is where our packages lie."""
    return shlex.join([python, "-SEc", _RUNNER, root, json.dumps(asdict(spec), sort_keys=True)])


def main() -> None:
    """The wrapper itself."""
    text, *worker = sys.argv[1:]
    spec = WorkerSpec(**json.loads(text))
    env = os.environ
    try:
        engine = EngineSocket(env)
        for folder in (spec.folder, spec.copies):
            Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        raylet = int(env["RAY_RAYLET_PID"])
        reaper.start_watch([os.getpid(), raylet], spec.container, env)
        private = reaper.make_private_folder(spec.container)
        engine.create(spec.container, worker_config(spec, worker, env, private))
        engine.start(spec.container)
    except Exception as error:
        # Whatever it is: a worker that does not come would be waited for.
        _stand_in(spec, worker, f"its container cannot be started: {str(error) or type(error).__name__}")
    status = _wait(engine, spec.container)
    lines, killed = _last_words(engine, spec.container)
    reaper.remove(spec.container, env)
    if not (Path(spec.folder) / UP).exists():
        _stand_in(spec, worker, f"its container ended with code {status} before the actor was up{killed}{lines}")
    sys.exit(status)


def worker_config(spec: WorkerSpec, worker: Sequence[str], env: Mapping[str, str], private: Path) -> dict[str, Any]:
    """The engine's description of the container; writes what the node keeps in variables and files are for."""
    options = dict(each.removeprefix("--").partition("=")[::2] for each in worker[1:])
    session = Path(options["temp-dir"]) / options["session-name"]
    folders = (str(session), spec.folder, spec.copies)
    mounts = [*_step_mounts(spec, env), *(Mount(folder, folder) for folder in folders)]
    inside = {
        **{name: value for name, value in env.items() if _is_allowed(name, env)},
        "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL": "minor",
        "SYGALDRY_IN_CONTAINER": "1",
        "USER": Path(HOME).name,
        "HOME": HOME,
        "HF_HOME": HF_HOME,
        FOLDER_VARIABLE: spec.folder,
    }
    if not spec.devices:
        # Images of NVIDIA ask for all GPUs, and an engine may have their runtime as its default.
        inside["NVIDIA_VISIBLE_DEVICES"] = "void"
    if token := _token_file(env, private):
        inside["RAY_AUTH_TOKEN_PATH"] = token
        mounts.append(Mount(token, token, read_only=True))
    if secrets := _secret_files(spec, env, private):
        inside[_SECRETS_DIR_VARIABLE] = _SECRETS
        # One by one: the folder they lie in has the secrets of other plans and runs.
        mounts += [Mount(str(file), f"{_SECRETS}/{name}", read_only=True) for name, file in secrets.items()]
    arguments = [spec.python, f"{KIT}/container/inside.py", "worker", KIT, *worker[1:]]
    config = base_config(spec, arguments, mounts, inside)
    config["Labels"] = {ACTOR_LABEL: spec.actor, reaper.OWNER_LABEL: reaper.owner()}
    if spec.memory:
        config["HostConfig"] |= {"Memory": spec.memory, "MemorySwap": spec.memory}
    if spec.cpus:
        config["HostConfig"]["NanoCpus"] = round(max(spec.cpus, _LEAST_CPUS) * 1e9)
    return config


def base_config(
    spec: WorkerSpec, arguments: Sequence[str], mounts: Sequence[Mount], env: Mapping[str, str]
) -> dict[str, Any]:
    """What the containers of actors have in common with the one that probes the image before."""
    places = {mount.container: mount for mount in [Mount(spec.kit, KIT, read_only=True), *mounts]}
    return {
        "Image": spec.image_id,
        "Entrypoint": list(arguments[:1]),
        "Cmd": list(arguments[1:]),
        "Env": [f"{name}={value}" for name, value in sorted(env.items())],
        "User": f"{os.getuid()}:{os.getgid()}",
        "WorkingDir": "/",
        "HostConfig": {
            # The raylet watches its workers by pid, talks to them by port and gives them objects in shared memory.
            "NetworkMode": "host",
            "PidMode": "host",
            "IpcMode": "host",
            "GroupAdd": [str(group) for group in os.getgroups() if group != os.getgid()],
            "Mounts": [
                {"Type": "bind", "Source": each.host, "Target": each.container, "ReadOnly": each.read_only}
                for each in places.values()
            ],
            "DeviceRequests": [dict(each) for each in spec.devices],
            "LogConfig": {"Type": "json-file", "Config": {"max-size": "10m"}},
        },
    }


def _step_mounts(spec: WorkerSpec, env: Mapping[str, str]) -> list[Mount]:
    folders = [folder for folder in spec.mounts if Path(folder).is_dir() and Path(folder) != Path("/")]
    # Of the project that commands in the plan's folder work for: there lies the store that `spack build` fills.
    named = spec.project or env.get("SYGALDRY_PROJECT_ID", "")
    project = project_id(named, Path(spec.mounts[0] if spec.mounts else "/"))
    root = Path(spec.root) if spec.root else container_root(env, project)
    standard = standard_mounts(root, Path(folders[0] if folders else spec.folder))
    return [*standard, *(Mount(folder, folder) for folder in folders)]


def _is_allowed(name: str, env: Mapping[str, str]) -> bool:
    """Ray's own variables, and those that whoever runs the node allows every step to see."""
    allowed = [_OF_RAY, *env.get("ORCHESTRATE_ENV_ALLOW", "").split(",")]
    return name not in _NOT_INSIDE and any(fnmatch.fnmatchcase(name, pattern.strip()) for pattern in allowed)


def _secret_files(spec: WorkerSpec, env: Mapping[str, str], private: Path) -> dict[str, Path]:
    """The file of each declared secret that this node has; one that is a variable is written to one.

    They are looked for in the order of `steps._secrets`, which also refuses what is no name.
    """
    kept = env.get(_SECRETS_DIR_VARIABLE)
    folders = [Path(kept, spec.own_secrets), Path(kept)] if kept else []
    found = {}
    for name in (name for name in spec.secrets if "/" not in name and not name.startswith(".")):
        if file := next((folder / name for folder in folders if (folder / name).is_file()), None):
            found[name] = file
        elif name in env:
            (private / "secrets").mkdir(mode=0o700, exist_ok=True)
            found[name] = private / "secrets" / name
            _write_private(found[name], env[name])
    return found


def _token_file(env: Mapping[str, str], private: Path) -> str:
    """File with the cluster's token on this node; a token that is a variable is written to one. Empty without token."""
    if env.get("RAY_AUTH_TOKEN"):
        _write_private(private / "token", env["RAY_AUTH_TOKEN"])
        return str(private / "token")
    path = Path(env.get("RAY_AUTH_TOKEN_PATH") or Path(env.get("HOME", "/")) / ".ray" / "auth_token")
    return str(path.resolve()) if path.is_file() else ""


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def _wait(engine: EngineSocket, name: str) -> int:
    """Exit code of the container. The watch ends it when the raylet has ended, and us before."""
    while True:
        try:
            return engine.wait(name)
        except EngineError as error:
            # An engine that is restarted may leave its containers running.
            if error.status == 404:
                return 137
            time.sleep(_PAUSE_S)


def _last_words(engine: EngineSocket, name: str) -> tuple[str, str]:
    """The end of the container's output, and whether the kernel killed it for its memory."""
    try:
        killed = ", killed because it needed more memory than its limit" * engine.inspect(name)["State"]["OOMKilled"]
        lines = engine.last_lines(name, 5)
    except EngineError:
        return "", ""
    return (f": {lines}" if lines else ""), killed


def _stand_in(spec: WorkerSpec, worker: Sequence[str], reason: str) -> NoReturn:
    """Become a worker of the host whose actor says why there is none in the image."""
    print(f"actor {spec.actor} does not run in its image: {reason}", file=sys.stderr, flush=True)
    # The watch tries for longer; Ray waits for a worker no more than a minute.
    reaper.remove(spec.container, os.environ, tries=1)
    os.execve(sys.executable, [sys.executable, *worker], {**os.environ, REFUSED_VARIABLE: reason[:2000]})
