"""What must hold before a cluster is brought up, on this machine and on each of its own; everything missing is told.

this machine: ssh, rsync, token, the key      each machine: login, Docker, rsync, image and its versions, ports
"""

import importlib.metadata
import importlib.util
import json
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.cluster_file import ClusterFile, Machine
from cluster.ssh import Login, RemoteError
from cluster.token_file import TokenError, check_token

HERE = "here"
"""Stands for this machine."""
_PARALLEL = 16
_CLOUD_LIBRARIES = {"aws": "boto3", "gcp": "googleapiclient"}
_SCRIPT = """
value() { printf '%s=%s\\n' "$1" "$2"; }
value user "$(id -u):$(id -g)"
value rsync "$(command -v rsync)"
value docker "$(docker version --format '{{.Server.Version}}' 2>&1 | tail -n 1)"
docker version >/dev/null 2>&1 && value docker_answers yes
value labels "$(docker image inspect --format '{{json .Config.Labels}}' "$image" 2>/dev/null)"
value running "$(docker ps --quiet --filter "label=orchestrate.cluster=$name" 2>/dev/null | tr '\\n' ' ')"
for port in $ports; do
  # Some of Ray listens at every address, its dashboard at loopback alone.
  for host in "$address" 127.0.0.1; do
    (exec 3<>"/dev/tcp/$host/$port") 2>/dev/null && value taken "$port" && break
  done
done
true
"""


@dataclass(frozen=True)
class Check:
    """The answer to one question about one machine."""

    machine: str
    name: str
    passed: bool
    text: str
    hint: str = ""


def check_cluster(cluster: ClusterFile) -> list[Check]:
    """Every check of every machine, failed ones too."""
    login = Login.of(cluster.content.get("auth", {}))
    with ThreadPoolExecutor(_PARALLEL) as pool:
        answers = pool.map(lambda machine: _machine(cluster, login, machine), cluster.machines)
        return [*_here(cluster, login), *(check for answer in answers for check in answer)]


def _here(cluster: ClusterFile, login: Login) -> list[Check]:
    checks = [
        Check(HERE, program, bool(found := shutil.which(program)), found or "not found", _install(program))
        for program in ("ssh", "rsync")
    ]
    if login.key:
        there = Path(login.key).is_file()
        checks.append(Check(HERE, "ssh key", there, login.key if there else f"`{login.key}` does not exist",
                            "set `auth.ssh_private_key` to the key of `auth.ssh_user`"))  # fmt: skip
    try:
        check_token(cluster.token_file)
        checks.append(Check(HERE, "token", True, str(cluster.token_file)))
    except TokenError as error:
        text, _, hint = str(error).partition("\n\nhint: ")
        checks.append(Check(HERE, "token", False, text, hint))
    if library := _CLOUD_LIBRARIES.get(cluster.content["provider"]["type"]):
        is_there = importlib.util.find_spec(library) is not None
        text = "installed" if is_there else "not installed"
        checks.append(Check(HERE, library, is_there, text, f"pip install {library}"))
    return checks


def _machine(cluster: ClusterFile, login: Login, machine: Machine) -> list[Check]:
    at = machine.address
    is_head = machine == cluster.machines[0]
    ports = cluster.head_ports.values() if is_head else ()
    given = {"image": machine.image, "name": cluster.name, "ports": " ".join(map(str, ports)), "address": at}
    head = "".join(f"{name}={shlex.quote(value)}\n" for name, value in given.items())
    try:
        lines = login.run(at, head + _SCRIPT).splitlines()
    except RemoteError as error:
        return [Check(at, "login", False, f"`ssh {login.user}@{at}`: {error}", "try that command with the same key")]
    pairs = [(name, value) for name, _, value in (line.partition("=") for line in lines)]
    values = dict(pairs)
    checks = [Check(at, "login", True, f"{login.user}, ids {values.get('user')}")]
    has_rsync = bool(values.get("rsync"))
    checks.append(Check(at, "rsync", has_rsync, values.get("rsync") or "not found", _install("rsync")))
    if "docker_answers" not in values:
        text = values.get("docker") or "not found"
        hint = f"install Docker there, and let `{login.user}` use it: `usermod -aG docker {login.user}`"
        return [*checks, Check(at, "docker", False, text, hint)]
    checks.append(Check(at, "docker", True, values["docker"]))
    checks += _image(machine, values.get("labels", ""), values.get("user", ""))
    # Ports that our own running cluster holds are in good hands.
    taken = [port for name, port in pairs if name == "taken" and not values.get("running", "").strip()]
    if is_head:
        text = f"taken: {', '.join(taken)}" if taken else ", ".join(map(str, ports))
        hint = "end what listens there, or change the ports in `head_start_ray_commands`"
        checks.append(Check(at, "ports", not taken, text, hint))
    return checks


def _image(machine: Machine, labels_text: str, user: str) -> list[Check]:
    """Whether the image is there, and fits: its labels tell."""
    at, image = machine.address, machine.image
    build = f"build it there (`orchestrate container build`), or `docker save {image} | ssh {at} docker load`"
    if not labels_text:
        return [Check(at, "image", False, f"`{image}` is not there", build)]
    labels: dict[str, Any] = json.loads(labels_text) or {}
    known = {name: labels.get(f"sygaldry.{name}", "") for name in ("ray_version", "python_version", "user")}
    if not known["ray_version"]:
        return [Check(at, "image", False, f"`{image}` does not come from `orchestrate container build`", build)]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    wanted = {"ray_version": importlib.metadata.version("ray"), "python_version": python, "user": user}
    names = {"ray_version": "Ray", "python_version": "Python", "user": "user ids"}
    checks = [Check(at, "image", True, image)]
    for name, value in wanted.items():
        fits = known[name] == value or (name == "python_version" and known[name].startswith(f"{value}."))
        text = known[name] if fits else f"`{image}` has {known[name] or 'none'}, wanted {value}"
        checks.append(Check(at, names[name], fits, text, build))
    return checks


def _install(program: str) -> str:
    package = "openssh-client" if program == "ssh" else program
    return f"apt-get install {package}"
