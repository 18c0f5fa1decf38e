"""How the local Ray is started: one head node on loopback, guarded by a token, without what plans do not need.

The address is 127.0.0.2: Ray replaces 127.0.0.1 by the address of a network card, which changes when a laptop moves.
Whatever its address, Ray opens its GCS, raylet, worker and metrics ports on every interface. The token guards all but
the two metrics ports, which show counters to whoever asks.
"""

import contextlib
import os
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

from bridge.state import State, StateError, private_dir, write_private

HOST = "127.0.0.2"
PORT_NAMES = (
    "port",
    "dashboard_port",
    "agent_port",
    "agent_grpc_port",
    "metrics_port",
    "runtime_env_port",
    "dashboard_metrics_port",
)
"""Ports that must be ours alone; Ray's own defaults for them are fixed numbers, or chosen at random."""

START_ONLY = ("RAY_START_HOOK", "RAY_DASHBOARD_STARTUP_TIMEOUT_S")
"""Variables that are meant for `ray start` itself."""

KEPT_SESSIONS = 2
"""Session folders of earlier Rays that are kept for their logs."""

_START_HOOK = "bridge.ray_head.without_client_server"


def address(ports: dict[str, int]) -> str:
    """What `ray.init` connects to."""
    return f"{HOST}:{ports['port']}"


def dashboard(ports: dict[str, int]) -> str:
    """URL of Ray's dashboard; it answers 401 without the token."""
    return f"http://127.0.0.1:{ports['dashboard_port']}"


def command(state: State, ports: dict[str, int]) -> list[str]:
    """The command line that starts Ray and stays as long as it lives."""
    return [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        f"--node-ip-address={HOST}",
        f"--port={ports['port']}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={ports['dashboard_port']}",
        f"--dashboard-agent-listen-port={ports['agent_port']}",
        f"--dashboard-agent-grpc-port={ports['agent_grpc_port']}",
        f"--metrics-export-port={ports['metrics_port']}",
        f"--runtime-env-agent-port={ports['runtime_env_port']}",
        f"--temp-dir={state.ray_temp_dir}",
        "--no-monitor",
        "--include-log-monitor=false",
        "--disable-usage-stats",
    ]


def environment(state: State, ports: dict[str, int]) -> dict[str, str]:
    """What is added to Ray's environment.

    The dashboard comes up by itself a little later: `ray start` shall not wait for it, and by not waiting it does not
    count the dashboard among the processes whose crash ends every step. (It logs `Failed to start the dashboard`.)
    Steps run at normal priority, as those beside the worker do: at Ray's own (nice 15) they starve on a busy machine.
    """
    # Here, because it brings pydantic, and the supervisor starts in a moment without.
    from steps._secrets import SECRETS_DIR_VARIABLE

    return {
        **client_environment(state),
        "RAY_START_HOOK": _START_HOOK,
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "0",
        "DASHBOARD_METRIC_PORT": str(ports["dashboard_metrics_port"]),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        SECRETS_DIR_VARIABLE: str(state.secrets_dir),
    }


def client_environment(state: State) -> dict[str, str]:
    """What a process needs in its environment to be let in."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(state.ray_token_file),
        "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL": "minor",
    }


def without_client_server(ray_params: Any, head: bool) -> None:
    """Hook of `ray start`: no Ray Client server, whose fixed port would collide with another Ray's.

    What only this start needs leaves the environment here, before Ray's processes and the steps in them inherit it.
    """
    ray_params.ray_client_server_port = None
    for name in START_ONLY:
        os.environ.pop(name, None)


def prepare(state: State) -> None:
    """Make the token and the temporary directory. `StateError` when others could read the token."""
    ensure_token(state.ray_token_file)
    private_dir(state.short_dir, may_be_link=False)
    private_dir(state.ray_temp_dir)
    address_file(state).unlink(missing_ok=True)
    sessions = sorted(path for path in state.ray_temp_dir.glob("session_2*") if path.is_dir())
    for session in sessions[:-KEPT_SESSIONS]:
        shutil.rmtree(session, ignore_errors=True)


def address_file(state: State) -> Path:
    """Written by `ray start` once the node is registered, so its presence means that Ray is usable."""
    return state.ray_temp_dir / "ray_current_cluster"


def ensure_token(path: Path) -> None:
    """Make the token file (256 bits, 0600) unless it is there; `StateError` when others could read it."""
    if not path.exists():
        private_dir(path.parent)
        write_private(path, os.urandom(32).hex())
    for checked, wanted in ((path.parent, 0o700), (path, 0o600)):
        status = checked.stat()
        mode = stat.S_IMODE(status.st_mode)
        if mode != wanted or status.st_uid != os.getuid():
            raise StateError(
                f"`{checked}` has mode `{mode:04o}` and owner `{status.st_uid}`, wanted `{wanted:04o}` and "
                f"`{os.getuid()}`\n\nhint: it guards Ray's ports; remove `{path}`, and a new one is made"
            )
    if len(path.read_text().strip()) < 64:
        raise StateError(f"`{path}` is too short for a token\n\nhint: remove it, and a new one is made")


def make_dashboard_yield(ray_pid: int) -> bool:
    """Give Ray's dashboard, ten processes, the lowest priority, so that it comes up without delaying the first step.

    False while it is not there yet.
    """
    for children in Path(f"/proc/{ray_pid}/task").glob("*/children"):
        for pid in children.read_text().split():
            with contextlib.suppress(OSError):
                if b"/dashboard.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.setpriority(os.PRIO_PROCESS, int(pid), 19)
                    return True
    return False


def kill_leftovers(state: State) -> None:
    """Kill what a Ray that has ended left running: it carries our marker and the priority only Ray is given."""
    from bridge import leftovers

    leftovers.kill_carrying(state, "RAY_worker_niceness=0")
