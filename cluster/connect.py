"""The only `ray.init` of plans; the stacks of `rl` connect by `rl.ray_cluster`.

    host:port        the head's control service, for a machine that runs a Ray node itself
    ray://host:port  the head's client server, for every other machine: one connection out, nothing listens here

A process that is a Ray driver ends by itself: Ray calls `exit(1)` in it when the cluster's control service has been
gone for 60 s. So a process that must live on (the Temporal worker) does not call this; it uses `cluster.dispatch`,
whose driver is a child process.
"""

import asyncio
import os
import socket
from pathlib import Path

NAMESPACE = "orchestrate"
FROM_OUTSIDE = "ray://"
"""Beginning of the address of a cluster that this machine is not part of."""
_PROBE_TIMEOUT_S = 2.0
_CLIENT_TIMEOUT_S = 10.0
_connected: list[str] = []
"""The address this process is connected to, if any."""


class ClusterError(Exception):
    """The Ray cluster cannot be reached or does not answer. Trying again later may help."""


class ClusterAuthError(ClusterError):
    """The Ray cluster does not accept our token."""


async def connect(address: str, token_file: Path | None = None) -> None:
    """Make this process a driver of the cluster at `address` (`host:port` or `ray://host:port`), once.

    A second call with the same address does nothing while the cluster answers; when it was replaced or another address
    is given, the old connection is closed first. Raises `ClusterError`.
    """
    await asyncio.to_thread(_connect, address, token_file)


def answers(address: str) -> bool:
    """True when something listens at `address` (`host:port` or `ray://host:port`)."""
    host, _, port = address.removeprefix(FROM_OUTSIDE).rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_TIMEOUT_S):
            return True
    except OSError:
        return False


def is_outside() -> bool:
    """True when this process is a driver on a machine that is not part of the cluster."""
    return bool(_connected) and _connected[0].startswith(FROM_OUTSIDE)


def connection_lives() -> bool:
    """True when the node process this driver is attached to lives, or its connection to a cluster elsewhere."""
    import ray

    if is_outside():
        return bool(ray.util.client.ray.is_connected())
    node = ray._private.worker._global_node
    if node is None:
        return False
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_PROBE_TIMEOUT_S)
            probe.connect(node.raylet_socket_name)
            return True
    except OSError:
        return False


def _connect(address: str, token_file: Path | None) -> None:
    if not address.rpartition(":")[2].isdigit():
        raise ClusterError(
            f"Ray address is `{address}`, wanted `host:port` of the head's control service, or `ray://host:port` of "
            "its client server"
        )
    if not answers(address):
        raise ClusterError(
            f"no Ray cluster answers at `{address}`\n\nhint: `orchestrate status` shows the local services; "
            "for a cluster of your own, check RAY_ADDRESS"
        )
    _set_environment(token_file)
    import ray

    if not ray.is_initialized() and token_file is not None:
        _read_token_anew()
    # `ray.init` would try a wrong token for 20 s.
    if not _is_let_in(address):
        raise ClusterAuthError(_token_refused(address, token_file))
    if ray.is_initialized():
        if _connected == [address] and connection_lives():
            return
        ray.shutdown()
    _connected.clear()
    try:
        ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level="error")
    except Exception as error:
        # Ray raises `ConnectionError`, `RuntimeError` and errors of its own here.
        raise ClusterError(
            f"the Ray cluster at `{address}` does not accept a driver here: {_last_line(error)}\n\n{_hint(address)}"
        ) from error

    _connected.append(address)


def _read_token_anew() -> None:
    """Ray keeps the mode and the token it found first, also when it was imported before we set them."""
    # The stub of Ray leaves these two out.
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _is_let_in(address: str) -> bool:
    """False when our token is refused. Raises `ClusterError` when nobody answers."""
    import grpc
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import ray_client_pb2, ray_client_pb2_grpc
    from ray.exceptions import AuthenticationError

    if not address.startswith(FROM_OUTSIDE):
        try:
            ray._raylet.GcsClient(address=address)
        except AuthenticationError:
            return False
        return True
    channel = init_grpc_channel(address.removeprefix(FROM_OUTSIDE))
    request = ray_client_pb2.ClusterInfoRequest(type=ray_client_pb2.ClusterInfoType.PING)
    try:
        ray_client_pb2_grpc.RayletDriverStub(channel).ClusterInfo(request, timeout=_CLIENT_TIMEOUT_S)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            return False
        raise ClusterError(
            f"no Ray client server answers at `{address}`: {error.details()}\n\n"
            "hint: the head listens for clients at `--ray-client-server-port`, by default 10001"
        ) from error
    finally:
        channel.close()
    return True


def _hint(address: str) -> str:
    if address.startswith(FROM_OUTSIDE):
        return "hint: driver and head need the same Ray and the same minor version of Python"
    return "hint: without a Ray node on this machine, use the head's client server: `ray://HEAD:10001`"


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _set_environment(token_file: Path | None) -> None:
    os.environ.setdefault("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "minor")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if token_file is not None:
        if not token_file.is_file():
            raise ClusterAuthError(f"Ray token file `{token_file}` does not exist")
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file)
        os.environ.pop("RAY_AUTH_TOKEN", None)


def _token_refused(address: str, token_file: Path | None) -> str:
    given = f"the token in `{token_file}`" if token_file else "a connection without a token file"
    return (
        f"the Ray cluster at `{address}` refuses {given}\n\n"
        "hint: use the token file the cluster was started with (RAY_AUTH_TOKEN_PATH of its head)"
    )
