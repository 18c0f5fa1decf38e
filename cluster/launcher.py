"""Ray's cluster launcher, wrapped: what `orchestrate cluster up` and `down` do after the checks.

up    token -> the file with absolute paths -> `ray up` -> every machine's node has joined
down  `ray down` -> on every machine: containers by the cluster's label, mounted files -> Ray's notes on this one
"""

import hashlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster.cluster_file import ClusterFile
from cluster.nodes import Node, NodesError, list_nodes
from cluster.ssh import Login, RemoteError
from cluster.token_file import ensure_token
from steps._files import write_whole

CONTAINER_LABEL = "orchestrate.cluster"
_LAUNCH_TIMEOUT_S = 3600.0
"""For `ray up`: it may pull an image of many gigabytes."""
_DOWN_TIMEOUT_S = 900.0
_HEAD_IP_TIMEOUT_S = 60.0
_POLL_S = 1.0
_PLAIN = ("--log-style=pretty", "--log-color=false")
_TAIL_LINES = 25

Say = Callable[[str], None]


class LaunchError(Exception):
    """Ray's launcher failed, or the cluster is not what it should be."""


def up(cluster: ClusterFile, folder: Path, say: Say, timeout_s: float) -> tuple[str, list[Node]]:
    """Bring the cluster up; the address for drivers and its nodes once every machine has joined.

    `folder` keeps the file as it was given to Ray. Raises `LaunchError`, `TokenError`.
    """
    assert cluster.token_file is not None
    if ensure_token(cluster.token_file):
        say(f"made token {cluster.token_file}")
    # A node of an earlier cluster would join the new head, and be stopped by it a moment later.
    if problems := _sweep(cluster, say):
        raise LaunchError("\n".join(problems))
    _forget(cluster)
    rendered = _render(cluster, folder)
    _ray(["up", "--yes", "--no-config-cache", *_PLAIN, str(rendered)], cluster, say, _LAUNCH_TIMEOUT_S)
    address = cluster.client_address(head_address(cluster, folder))
    return address, _wait_for_nodes(cluster, address, say, timeout_s)


def down(cluster: ClusterFile, folder: Path, say: Say) -> list[str]:
    """Take the cluster down and leave nothing of it. What could not be cleaned, one sentence each."""
    rendered = _render(cluster, folder)
    problems = []
    try:
        _ray(["down", "--yes", *_PLAIN, str(rendered)], cluster, say, _DOWN_TIMEOUT_S)
    except LaunchError as error:
        problems.append(str(error))
    if cluster.machines:
        # They say themselves whether anything is left.
        problems = _sweep(cluster, say)
    if not problems:
        _forget(cluster)
        rendered.unlink(missing_ok=True)
    return problems


def head_address(cluster: ClusterFile, folder: Path) -> str:
    """Address of the head as seen from here. Raises `LaunchError`."""
    if cluster.machines:
        return cluster.machines[0].address
    said: list[str] = []
    _ray(["get-head-ip", str(_render(cluster, folder))], cluster, said.append, _HEAD_IP_TIMEOUT_S)
    return said[-1].strip()


def _wait_for_nodes(cluster: ClusterFile, address: str, say: Say, timeout_s: float) -> list[Node]:
    """The nodes, once there is one for each machine; a cloud's workers come when they are needed."""
    wanted = {machine.address for machine in cluster.machines}
    deadline, missing, trouble = time.monotonic() + timeout_s, sorted(wanted), ""
    while time.monotonic() < deadline:
        try:
            nodes = list_nodes(address, cluster.token_file)
        except NodesError as error:
            trouble = str(error)
        else:
            trouble = ""
            still = sorted(wanted - {node.address for node in nodes if node.alive})
            if not still:
                return nodes
            if still != missing:
                say(f"waiting for {', '.join(still)}")
            missing = still
        time.sleep(_POLL_S)
    what = trouble or f"no Ray node on {', '.join(f'`{one}`' for one in missing)}"
    raise LaunchError(
        f"the cluster is not complete after {timeout_s:g} s: {what}\n\n"
        f"hint: `ray monitor {cluster.path}` shows what the head does to start the others"
    )


def _sweep(cluster: ClusterFile, say: Say) -> list[str]:
    """Remove containers and mounted files of the cluster from its own machines; what was not possible."""
    if not cluster.machines:
        return []
    login = Login.of(cluster.content.get("auth", {}))
    label, mounts = shlex.quote(f"label={CONTAINER_LABEL}={cluster.name}"), f"/tmp/ray_tmp_mount/{cluster.name}"
    script = f"""
    ids=$(docker ps --all --quiet --filter {label}) || exit 1
    [ -z "$ids" ] || docker rm --force $ids
    rm -rf {shlex.quote(mounts)}
    """

    def clean(address: str) -> str:
        try:
            removed = login.run(address, script).split()
        except RemoteError as error:
            return f"`{address}` could not be cleaned: {error}"
        if removed:
            say(f"{address}: removed {len(removed)} containers that were left")
        return ""

    with ThreadPoolExecutor(16) as pool:
        # The head first: it would start its workers again.
        first, *others = [machine.address for machine in cluster.machines]
        return list(filter(None, [clean(first), *pool.map(clean, others)]))


def _forget(cluster: ClusterFile) -> None:
    """Remove the notes that Ray keeps of machines of our own; those of a cloud find its machines again."""
    if not cluster.machines:
        return
    from ray.autoscaler._private.local.config import get_lock_path, get_state_path

    for path in (get_state_path(cluster.name), get_lock_path(cluster.name)):
        Path(path).unlink(missing_ok=True)
    marker = f'"cluster_name": "{cluster.name}"'
    for cached in Path(tempfile.gettempdir()).glob("ray-config-*"):
        if cached.is_file() and marker in cached.read_text(errors="replace"):
            cached.unlink(missing_ok=True)


def _render(cluster: ClusterFile, folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # One of a file and its name: two files may name their clusters alike.
    digest = hashlib.sha256(str(cluster.path).encode()).hexdigest()[:8]
    path = folder / f"{cluster.name}-{digest}.yaml"
    write_whole(path, cluster.rendered())
    return path


def _ray(arguments: list[str], cluster: ClusterFile, say: Say, timeout_s: float) -> None:
    """Run a command of Ray's launcher, passing on what it says. Raises `LaunchError` with the end of that."""
    argv = [str(Path(sys.executable).with_name("ray")), *arguments]
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(cluster.token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_UP_enable_autoscaler_v2": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")])),
    }
    process = subprocess.Popen(
        argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    killer = threading.Timer(timeout_s, lambda: os.killpg(process.pid, signal.SIGKILL))
    killer.start()
    tail: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            tail = [*tail[1 - _TAIL_LINES :], line.rstrip()]
            say(line.rstrip())
        code = process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    finally:
        killer.cancel()
    if code != 0:
        what = f"killed after {timeout_s:g} s" if code == -signal.SIGKILL else f"exit code {code}"
        raise LaunchError(f"`ray {arguments[0]}` failed ({what}):\n" + "\n".join(tail))
