"""The Ray cluster of a run: the one this process is in, the one that RAY_ADDRESS names, or one of its own.

    connected() -> already connected? | RAY_ADDRESS (with RAY_AUTH_TOKEN_PATH) | a local Ray on loopback, with a token

What was begun here is ended here; imports no ray before it is called.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

NAMESPACE = "orchestrate-rl"
_HOST = "127.0.0.2"
"""Ray replaces 127.0.0.1 by the address of a network card."""
_OBJECT_STORE_BYTES = 256 << 20
"""Weights go by shared memory here; groups and batches are small."""


@contextmanager
def connected(gpus: float = 0, object_store_bytes: int = _OBJECT_STORE_BYTES) -> Iterator[None]:
    """Be connected to Ray; `gpus` are what the run asks for. Raises ValueError where the cluster has fewer.

    `object_store_bytes` is for a Ray that begins here.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise ValueError(
            f"RAY_ADDRESS is `{address}`, wanted `host:port` of the head's control service\n\n"
            "hint: run on a machine of the cluster; for one that is not, there is no way of bringing it weights"
        )
    folder = None
    if not address:
        _set_own_environment()
    import ray

    begun = not ray.is_initialized()
    try:
        if begun and address:
            ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level="error")
        elif begun:
            # Ray's sockets lie in this folder, and a socket's path is at most 107 bytes long.
            folder = tempfile.mkdtemp(prefix="rl-ray-")
            ray.init(
                "local",
                namespace=NAMESPACE,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
                object_store_memory=object_store_bytes,
                _node_ip_address=_HOST,
                _temp_dir=folder,
            )
        found = ray.cluster_resources().get("GPU", 0)
        if found < gpus:
            raise ValueError(
                f"the run asks for {gpus:g} GPUs, the Ray cluster has {found:g}\n\n"
                "hint: lower `generator_gpus`, `trainer_gpus` or `num_generators`, or set RAY_ADDRESS to another one"
            )
        yield
    finally:
        if begun:
            ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def is_one_host() -> bool:
    """Whether all of the cluster is the machine of this process."""
    import ray

    nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return nodes == {ray.get_runtime_context().get_node_id()}


def _set_own_environment() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # At Ray's own priority the parts starve on a busy machine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(Path(_token_folder().name, "token"))
    os.environ["RAY_AUTH_MODE"] = "token"


@cache
def _token_folder() -> "tempfile.TemporaryDirectory[str]":
    """With a token for as long as this process lives: Ray reads it once."""
    folder = tempfile.TemporaryDirectory(prefix="rl-ray-token-")
    with open(os.open(Path(folder.name, "token"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123 - mode 0600
        file.write(os.urandom(32).hex())
    return folder
