"""The Docker Engine that an environment names, and whether it answers; where every container call begins."""

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from docker import DockerClient

REQUEST_TIMEOUT_S = 60


class EngineUnreachable(Exception):
    """No Docker Engine can be used where the environment says one is."""


def connect(env: Mapping[str, str], timeout_s: int = REQUEST_TIMEOUT_S) -> "DockerClient":
    """A client of the engine named by `DOCKER_HOST` (and `DOCKER_TLS_VERIFY`, `DOCKER_CERT_PATH`), else the local one.

    `timeout_s` is how long one request may stay silent. Registry logins are those of `DOCKER_CONFIG` or
    `HOME/.docker`. Raises `EngineUnreachable`.
    """
    import docker
    from docker.errors import DockerException

    named = {name: env[name] for name in ("DOCKER_HOST", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH") if env.get(name)}
    where = named.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    try:
        if where.startswith("unix://"):
            # Before the SDK, which leaks its socket when it cannot connect.
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(timeout_s)
                probe.connect(where.removeprefix("unix://"))
        client = docker.from_env(
            # An empty mapping would mean the environment of this process.
            environment=named or {"DOCKER_HOST": where},
            timeout=timeout_s,
            use_ssh_client=where.startswith("ssh://"),
        )
    except (DockerException, OSError) as error:
        raise EngineUnreachable(
            f"no Docker Engine answers at `{where}`: {_innermost(error)}\n\n"
            "hint: start the engine, give this user access to its socket (group `docker`), or set `DOCKER_HOST`"
        ) from error
    folder = Path(env["DOCKER_CONFIG"]) if env.get("DOCKER_CONFIG") else Path(env.get("HOME", "/")) / ".docker"
    if (folder / "config.json").is_file():
        try:
            client.api.reload_config(str(folder / "config.json"))
        except (DockerException, ValueError) as error:
            client.close()
            raise EngineUnreachable(f"`{folder / 'config.json'}` is not a Docker configuration: {error}") from error
    return client


def _innermost(error: BaseException) -> str:
    inner = error.__cause__ or error.__context__
    while inner is not None:
        error, inner = inner, inner.__cause__ or inner.__context__
    return str(error) or type(error).__name__
