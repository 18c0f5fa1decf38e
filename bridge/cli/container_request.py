"""What a person asked a container to be, put together with what this machine has: `Request.job`."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.cli.container_engine import engine, say
from bridge.cli.failure import Failure
from container import reaper
from container.environment import EnvironmentProblem, environments, find
from container.foreground import new_name
from container.gpu_choice import choose, parse_gpus
from container.image_spec import DEFAULT_NAME
from container.launch import PORTABLE_NAMES, SECRET_NAMES, Job, LaunchError, entrypoint_path, is_secret, memory_bytes
from container.machine import ThisMachine
from container.mounts import Mount, container_root, parse_mounts, project_id
from container.spack_place import ENVIRONMENTS

if TYPE_CHECKING:
    from docker import DockerClient

_OF_INSTALLERS = (
    "UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_NO_INDEX", "UV_INDEX_STRATEGY",
    "UV_OFFLINE", "UV_HTTP_TIMEOUT", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL",
)  # fmt: skip
"""Where packages come from, for the verbs that install some."""
_PORT = re.compile(
    r"(?:(?:(?P<address>[0-9.]+|\[[0-9a-fA-F:]+\]):)?(?P<host>\d+):)?(?P<port>\d+)(?:/(?P<kind>tcp|udp))?"
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Request:
    """The options of a launch, as they were given."""

    entrypoint: str
    command: Sequence[str]
    of_project: bool
    image: str | None
    project_id: str | None
    workspace: Path
    environment: str | None
    gpus: str | None
    memory: str
    cpus: float | None
    mounts: Sequence[str]
    ports: Sequence[str]
    env: Sequence[str]
    secrets: Sequence[str]
    network: str | None
    name: str | None

    def job(self, env: Mapping[str, str], *, may_change: bool) -> tuple[Job, Mapping[str, Any]]:
        """The job, and the engine's `info`. The image is built or pulled when it is missing and `may_change`.

        Raises `Failure`, with the exit code it deserves.
        """
        try:
            project = project_id(self.project_id or env.get("SYGALDRY_PROJECT_ID", ""), self.workspace)
            mounts = [*self._environments(), *parse_mounts(self.mounts, Path.cwd())]
            asked = parse_gpus(self.gpus) if self.gpus else None
            # Before an image is built, which may take long.
            entrypoint_path(self.entrypoint)
            memory_bytes(self.memory)
        except (ValueError, EnvironmentProblem, LaunchError) as error:
            raise Failure(str(error)) from error
        if self.name and not _NAME.fullmatch(self.name):
            raise Failure(f"name `{self.name}` is not one for a container", "letters, digits, `.`, `_` and `-`")
        ports = dict(_port(text) for text in self.ports)
        if ports and self.network == "host":
            raise Failure("`--port` with `--network host`: on the host's network every port is the host's own")
        variables, secrets = self._environment(env)
        with engine() as client:
            info = client.info()
            if may_change:
                reaper.reap(env)
                _refuse_taken(client, self.name)
            image, image_env = _image(client, self.image or env.get("SYGALDRY_IMAGE") or DEFAULT_NAME, may_change)
            choice = choose(asked, env, info, ThisMachine(), image_env, lambda text: say(f"warning: {text}"))
        name = self.name or new_name(project, self.entrypoint)
        job = Job(
            key=f"foreground/{project}/{name}/1",
            command=self.command,
            project_id=project,
            root=container_root(env, project),
            workspace=self.workspace,
            image=image,
            entrypoint=self.entrypoint,
            env=variables,
            secrets=secrets,
            mounts=mounts,
            gpu=choice.gpu,
            gpus=choice.ids,
            gpu_count=choice.count,
            memory=self.memory,
            cpus=self.cpus or 0,
            network=self.network or ("bridge" if ports else "host"),
            ports=ports,
            container_name=name,
        )
        return job, info

    def _environments(self) -> list[Mount]:
        """Folders of Spack environments that are needed beside what is built of them."""
        if self.entrypoint.startswith("spack-"):
            wanted = environments()
        elif self.environment and "/" in self.environment:
            wanted = [find(self.environment)]
        else:
            return []
        return [Mount(str(each.folder), f"{ENVIRONMENTS}/{each.name}", read_only=True) for each in wanted]

    def _environment(self, env: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
        """What the container's environment gets in the open, and what by file."""
        names = [*PORTABLE_NAMES, *SECRET_NAMES, *(_OF_INSTALLERS if self.of_project else ())]
        whole = {name: env[name] for name in names if name in env}
        for text in self.env:
            name, given, value = text.partition("=")
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise Failure(f"variable `{name}` is not a name\n\nhint: `--env NAME=VALUE`, or `--env NAME`")
            if not given and name not in env:
                raise Failure(f"variable `{name}` is not set here", f"set it, or give a value: `--env {name}=VALUE`")
            whole[name] = value if given else env[name]
        if self.environment:
            # A folder has been mounted under its name.
            whole["SYGALDRY_SPACK_ENVIRONMENT"] = Path(self.environment).name
        hidden = _secrets(self.secrets)
        whole.update(hidden)
        secret = {
            name: value
            for name, value in whole.items()
            if is_secret(name, value) or any(each in value for each in hidden.values() if each)
        }
        return {name: value for name, value in whole.items() if name not in secret}, secret


def _secrets(names: Sequence[str]) -> dict[str, str]:
    if not names:
        return {}
    from bridge.state import State
    from steps import StepError
    from steps._secrets import SECRETS_DIR_VARIABLE, resolve_secrets

    os.environ.setdefault(SECRETS_DIR_VARIABLE, str(State.from_environment().secrets_dir))
    try:
        return resolve_secrets(names, "")
    except StepError as error:
        what = str(error).partition("\n")[0]
        raise Failure(what, "`orchestrate secret set NAME`, or set the variable here") from error


def _port(text: str) -> tuple[str, tuple[str, int]]:
    found = _PORT.fullmatch(text)
    if found is None or not all(0 < int(number) < 65536 for number in (found["port"], found["host"] or "1")):
        raise Failure(f"port is `{text}`, wanted `8080`, `8080:80` or `ADDRESS:8080:80`")
    return f"{found['port']}/{found['kind'] or 'tcp'}", (
        found["address"] or "127.0.0.1",
        int(found["host"] or found["port"]),
    )


def _refuse_taken(client: "DockerClient", name: str | None) -> None:
    from docker.errors import NotFound

    if not name:
        return
    try:
        state = client.api.inspect_container(name)["State"]["Status"]
    except NotFound:
        return
    raise Failure(f"there is a container `{name}`, which is {state}", "give another name with `--name`, or none")


def _image(client: "DockerClient", name: str, may_change: bool) -> tuple[str, Sequence[str]]:
    """Name of the image, and its environment as far as it is known."""
    from docker.errors import ImageNotFound

    from container.standard_image import standard_image

    try:
        found = standard_image(client, name, say) if may_change else client.images.get(name)
    except ImageNotFound:
        say(f"hint: `{name}` is not on this machine; a launch gets it first")
        return name, ()
    # A standard image is built under a name that tells its content.
    return name if name in found.tags else str(found.id), found.attrs["Config"].get("Env") or []
