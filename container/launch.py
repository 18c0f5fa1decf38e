"""Starts one job in the standard container, or finds the one that an earlier call with the same key started.

    Job -> run_options -> create -> start          name: orchestrate-<hash of key>
              attach <- same name, not fresh       labels: orchestrate.key, .step_key, .attempt, .project_id, .state
              remove <- same step, other attempt

The engine's answers are passed on as they come (`docker.errors.APIError`); what the job asks for and this machine
cannot give is a `LaunchError`.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from container.mounts import ENTRYPOINTS, HF_HOME, HOME, WORKSPACE, Mount, standard_mounts

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.containers import Container

DEFAULT_IMAGE = "sygaldry/zephyr:base"
"""The standard image; it is built, never pulled."""
SECRETS_IN_CONTAINER = "/run/sygaldry/secrets"
OUTPUTS_IN_CONTAINER = "/run/sygaldry/outputs.jsonl"
PORTABLE_NAMES = (
    "TERM", "LANG", "LC_ALL", "TZ", "BAZEL_VERSION", "HF_ENDPOINT", "HF_HUB_OFFLINE",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip
"""Of the host's environment, what means the same inside a container."""
SECRET_NAMES = ("HF_TOKEN",)
"""Of the host's environment, what a container gets as a secret."""
_LOGIN = re.compile(r"://[^/\s]*@")
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", re.IGNORECASE)
_FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class LaunchError(Exception):
    """The job cannot be started as asked; asking again cannot help."""


@dataclass(frozen=True)
class Job:
    """One job and all that its container gets."""

    key: str
    """`workflow/run/step/attempt`."""
    command: Sequence[str]
    """Program and arguments, run by the entrypoint."""
    project_id: str
    root: Path
    """Host folder of the project's caches."""
    workspace: Path
    """Host folder the job works in."""
    image: str = DEFAULT_IMAGE
    entrypoint: str = "run-job"
    """Name of one of our entrypoints, with or without `.sh`."""
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Environment that no record of the engine may show; it travels in a file."""
    mounts: Sequence[Mount] = ()
    """In addition to the standard ones; one with the same place in the container replaces that."""
    gpu: bool = False
    gpus: Sequence[str] = ()
    """Ids of the GPUs to give; with `gpu` and no ids, all."""
    gpu_count: int = 0
    """With `gpu` and no ids, how many to give; 0 is all."""
    memory: str = ""
    """Limit such as `8GiB`; none by default."""
    cpus: float = 0
    """Limit in cores; 0 is none."""
    network: str = "host"
    ports: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Port of the container, such as `80/tcp`, and the address and port of the host where it is reached."""
    outputs: Path | None = None
    """Host file that the job sees as `$STEP_OUTPUTS`."""
    container_name: str = ""
    """Name of the container, when it should have another than the key's."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """In addition to those that every job has."""

    @property
    def name(self) -> str:
        """Name of the container: the same for the same key."""
        return self.container_name or f"orchestrate-{hashlib.sha256(self.key.encode()).hexdigest()[:20]}"

    @property
    def step_key(self) -> str:
        """Key of the step, shared by its attempts."""
        return self.key.rpartition("/")[0]


def is_secret(name: str, value: str) -> bool:
    """True for a variable that no record may show: by its name, or because its value is an address with a login."""
    return name in SECRET_NAMES or _LOGIN.search(value) is not None


def entrypoint_names() -> list[str]:
    """Names of our entrypoints, without `.sh`."""
    folder = Path(__file__).parent / "entrypoints"
    return sorted(path.stem for path in folder.glob("*.sh") if not path.stem.startswith("_"))


def entrypoint_path(name: str) -> str:
    """Path of an entrypoint in the container, its name with or without `.sh`. Raises `LaunchError`."""
    known = entrypoint_names()
    if name.removesuffix(".sh") not in known:
        raise LaunchError(f"there is no entrypoint `{name}`\n\nhint: known entrypoints: {', '.join(known)}")
    return f"{ENTRYPOINTS}/{name.removesuffix('.sh')}.sh"


def attach_or_start(client: "DockerClient", job: Job, say: Callable[[str], None]) -> "Container":
    """The container of `job`: running or ended when there is one of the same key, else started now."""
    from docker.errors import APIError

    found = None
    for other in client.containers.list(all=True, filters={"label": f"orchestrate.step_key={job.step_key}"}):
        if other.name == job.name and other.status != "created":
            found = other
        else:
            remove(client, other.name or "")
    if found is not None:
        say(f"attached to container {found.name}, which is {found.status}")
        return found
    options = run_options(job, client.info(), _image_id(client, job.image, say))
    if job.secrets:
        write_secrets(secrets_file(job.name), job.secrets)
    created = client.containers.create(**options)
    try:
        created.start()
    except APIError as error:
        said = str(error.explanation or error)
        remove(client, job.name)
        raise LaunchError(f"container of image `{job.image}` cannot be started: {said}") from error
    return created


def remove(client: "DockerClient", name: str) -> None:
    """Kill and remove a container of ours and its secrets; nothing happens when it is gone."""
    from docker.errors import APIError, NotFound

    try:
        client.api.remove_container(name, force=True, v=True)
    except NotFound:
        pass
    except APIError as error:
        # 409: somebody else is removing it.
        if error.status_code != 409:
            raise
    finally:
        secrets_file(name).unlink(missing_ok=True)


def run_options(job: Job, engine: Mapping[str, Any], image_id: str) -> dict[str, Any]:
    """What to ask the engine for, as arguments of `containers.create`; `engine` is its `info`. Raises `LaunchError`."""
    from docker.types import LogConfig
    from docker.types import Mount as BindMount

    mounts = {mount.container: mount for mount in [*standard_mounts(job.root, job.workspace), *job.mounts]}
    env = {
        **job.env,
        "SYGALDRY_IN_CONTAINER": "1",
        "SYGALDRY_PROJECT_ID": job.project_id,
        # The init process passes SIGTERM on to the whole group, so that a program under a shell hears it.
        "TINI_KILL_PROCESS_GROUP": "1",
    }
    for name, value in (("USER", Path(HOME).name), ("HOME", HOME), ("HF_HOME", HF_HOME)):
        env.setdefault(name, value)
    if job.outputs is not None:
        job.outputs.touch()
        env["STEP_OUTPUTS"] = OUTPUTS_IN_CONTAINER
        mounts[OUTPUTS_IN_CONTAINER] = Mount(str(job.outputs), OUTPUTS_IN_CONTAINER)
    if job.secrets:
        mounts[SECRETS_IN_CONTAINER] = Mount(str(secrets_file(job.name)), SECRETS_IN_CONTAINER, read_only=True)
    return {
        "image": image_id,
        "name": job.name,
        "entrypoint": ["bash", entrypoint_path(job.entrypoint)],
        "command": list(job.command),
        "environment": dict(sorted(env.items())),
        "labels": {
            "orchestrate.key": job.key,
            "orchestrate.step_key": job.step_key,
            "orchestrate.attempt": job.key.rpartition("/")[2],
            "orchestrate.project_id": job.project_id,
            **job.labels,
        },
        "mounts": [
            BindMount(each.container, each.host, type="bind", read_only=each.read_only) for each in mounts.values()
        ],
        "user": f"{os.getuid()}:{os.getgid()}",
        "group_add": [str(group) for group in os.getgroups() if group != os.getgid()],
        "working_dir": WORKSPACE,
        "init": True,
        "network_mode": job.network or "host",
        "ports": dict(job.ports),
        "ipc_mode": "host",
        "device_requests": gpu_requests(engine, job.gpus, job.gpu_count) if job.gpu or job.gpus else [],
        "mem_limit": memory_bytes(job.memory),
        "nano_cpus": round(job.cpus * 1e9) or None,
        # The log is read back from the engine, so it must be of a kind that can be.
        "log_config": LogConfig(type=LogConfig.types.JSON, config={}),
    }


def gpu_requests(engine: Mapping[str, Any], ids: Sequence[str] = (), count: int = 0) -> list[Any]:
    """How to ask the engine (its `info`) for these GPUs, or `count`, or all: as docker's `DeviceRequest`s, which are
    also the engine's own JSON. Raises `LaunchError` when it cannot give any.
    """
    from docker.types import DeviceRequest

    if "nvidia" in (engine.get("Runtimes") or {}):
        chosen = {"device_ids": list(ids)} if ids else {"count": count or -1}
        return [DeviceRequest(driver="nvidia", capabilities=[["gpu"]], **chosen)]
    if any(str(device.get("ID", "")).startswith("nvidia.com/gpu") for device in engine.get("DiscoveredDevices") or []):
        # By CDI there is no count, only names.
        names = ids or ([str(index) for index in range(count)] or ["all"])
        ids = [f"nvidia.com/gpu={name}" for name in names]
        return [DeviceRequest(driver="cdi", device_ids=ids)]
    raise LaunchError(
        "the job asks for a GPU, but this Docker Engine has no NVIDIA runtime\n\n"
        "hint: install the NVIDIA Container Toolkit and run `nvidia-ctk runtime configure`, or leave `gpu` away"
    )


def _image_id(client: "DockerClient", image: str, say: Callable[[str], None]) -> str:
    """Id of a local image; pulled when there is none. The id, so that a tag that moves changes nothing now."""
    from docker.errors import APIError, ImageNotFound

    try:
        return str(client.images.get(image).id)
    except ImageNotFound:
        say(f"image `{image}` is not on this machine; pulling it")
    try:
        return str(client.images.pull(image).id)
    except APIError as error:
        raise LaunchError(
            f"image `{image}` is not on this machine and cannot be pulled: {error.explanation or error}\n\n"
            "hint: build it (`orchestrate container build`), or set `image` (or `SYGALDRY_IMAGE`) to one that exists"
        ) from error


def memory_bytes(text: str) -> int | None:
    """Bytes of a size such as `8GiB` or `512m`; None for an empty text. Raises `LaunchError`."""
    if not text:
        return None
    found = _MEMORY.fullmatch(text.strip())
    if found is None:
        raise LaunchError(f"memory `{text}` is not a size\n\nhint: wanted something like `8GiB` or `512m`")
    return int(float(found[1]) * _FACTORS[found[2].lower()])


def secrets_file(name: str) -> Path:
    """Where this machine keeps the secrets of a container: in memory if it can, so that no disk keeps the values."""
    folders = [os.environ.get("XDG_RUNTIME_DIR", ""), "/dev/shm", "/tmp"]
    folder = next(each for each in folders if each and os.access(each, os.W_OK | os.X_OK))
    return Path(folder) / f"{name}-{os.getuid()}.secrets"


def write_secrets(path: Path, secrets: Mapping[str, str]) -> None:
    """Write the file that an entrypoint reads them from, for this user only. Raises `LaunchError`."""
    for name in secrets:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise LaunchError(f"`{name}` holds a secret and is not a name that a shell takes for a variable")
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(b"".join(f"{name}={value}".encode() + b"\0" for name, value in sorted(secrets.items())))
