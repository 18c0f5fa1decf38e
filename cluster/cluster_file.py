"""A cluster file, `ray-cluster.yaml`: what Ray's launcher reads, and what we need to know of it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from cluster.token_file import mounted_token

ON_PREMISES = "cluster.on_premises.OnPremises"
CODE = "/orchestrate"
"""Where nodes find our packages."""
CODE_PACKAGES = ("cluster", "container", "steps")
CLIENT_PORT = 10001
_PROBLEM_LIMIT = 10


class ClusterFileError(Exception):
    """The cluster file cannot be used."""


@dataclass(frozen=True)
class Machine:
    """One computer of a cluster of our own machines."""

    address: str
    type: str
    image: str


@dataclass(frozen=True)
class ClusterFile:
    """One cluster file, read and valid."""

    path: Path
    content: dict[str, Any]

    @property
    def name(self) -> str:
        """The cluster's name."""
        return str(self.content["cluster_name"])

    @property
    def is_on_premises(self) -> bool:
        """True when the machines are named in the file."""
        return bool(self.content["provider"].get("module") == ON_PREMISES)

    @cached_property
    def machines(self) -> tuple[Machine, ...]:
        """The machines, the head first; none for a cloud. Raises `ClusterFileError`."""
        if not self.is_on_premises:
            return ()
        head_type, types = self.content["head_node_type"], self.content["available_node_types"]
        found = [
            Machine(str(address), name, self._image(name, kind))
            for name, kind in types.items()
            for address in kind["node_config"].get("ips", [])
        ]
        heads = [machine for machine in found if machine.type == head_type]
        if len(heads) != 1:
            raise ClusterFileError(
                f"`{self.path}` names {len(heads)} machines of the head's type `{head_type}`, wanted one\n\n"
                f"hint: available_node_types: {{{head_type}: {{node_config: {{ips: [ADDRESS]}}}}}}"
            )
        return (*heads, *(machine for machine in found if machine.type != head_type))

    @property
    def container(self) -> str:
        """Name of the container on every machine; the machine's shell expands it."""
        return str(self.content.get("docker", {}).get("container_name", ""))

    @property
    def token_file(self) -> Path | None:
        """The token on this machine."""
        return mounted_token(self.content)

    @property
    def head_ports(self) -> dict[str, int]:
        """Ports the head listens at, by the option of `ray start` that sets them."""
        command = " ".join(self.content["head_start_ray_commands"])
        found = {name: int(port) for name, port in re.findall(r"--((?:[a-z-]+-)?port)[= ](\d+)", command)}
        return {"port": 6379, "ray-client-server-port": CLIENT_PORT, "dashboard-port": 8265} | found

    def client_address(self, head: str) -> str:
        """What a driver outside connects to."""
        return f"ray://{head}:{self.head_ports['ray-client-server-port']}"

    def rendered(self) -> str:
        """The file with absolute paths, ours those of this installation; what `orchestrate cluster` gives to Ray."""
        folders = {f"{CODE}/{name}": Path(__file__).parent.parent / name for name in CODE_PACKAGES}
        mounts = {
            target: str(folders.get(target, self.path.parent / Path(source).expanduser()))
            for target, source in self.content.get("file_mounts", {}).items()
        }
        return json.dumps({**self.content, "file_mounts": mounts}, indent=1)

    def _image(self, type_name: str, kind: Mapping[str, Any]) -> str:
        docker = self.content.get("docker", {})
        part = "head_image" if type_name == self.content["head_node_type"] else "worker_image"
        return str(kind.get("docker", {}).get(part) or docker.get(part) or docker.get("image", ""))


def read_cluster_file(path: Path) -> ClusterFile:
    """Read and check a cluster file against Ray's own schema. Raises `ClusterFileError` with everything wrong in it."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ClusterFileError(f"cannot read `{path}`: {error.strerror}\n\nhint: --config names the file") from error
    except yaml.YAMLError as error:
        raise ClusterFileError(f"`{path}` is no YAML: {error}") from error
    if problems := schema_problems(content):
        raise ClusterFileError(
            f"`{path}` is no cluster file:\n" + "\n".join(f"  {problem}" for problem in problems[:_PROBLEM_LIMIT])
        )
    return ClusterFile(path.absolute(), content)


def schema_problems(content: Any) -> list[str]:
    """What Ray's launcher would refuse, one sentence each."""
    import jsonschema
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    errors = sorted(
        jsonschema.Draft7Validator(schema).iter_errors(content), key=lambda error: list(map(str, error.path))
    )
    return [f"{'.'.join(map(str, error.absolute_path)) or 'the whole'}: {error.message}" for error in errors]
