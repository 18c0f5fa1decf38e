"""The cluster that `orchestrate cluster up` has brought up last: where steps that ask for resources go.

`RAY_ADDRESS` wins over it, and the local Ray is used when there is neither. Steps that drive a container engine stay
with the local Ray: the nodes of a cluster that was brought up are containers themselves, in which no engine answers.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from bridge.state import State, write_private


@dataclass(frozen=True)
class CurrentCluster:
    """One line in the state directory."""

    name: str
    address: str
    """What drivers connect to, such as `ray://192.168.1.10:10001`."""
    token_file: str
    config: str
    """The cluster file."""


def current_cluster(state: State) -> CurrentCluster | None:
    """The cluster in use, or None."""
    try:
        return CurrentCluster(**json.loads(_path(state).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def use_cluster(state: State, cluster: CurrentCluster) -> None:
    """From now on steps go there."""
    write_private(_path(state), json.dumps(asdict(cluster)))


def forget_cluster(state: State, name: str) -> None:
    """Steps go there no more."""
    found = current_cluster(state)
    if found is not None and found.name == name:
        _path(state).unlink(missing_ok=True)


def chosen_cluster(state: State, *, with_engine: bool = False) -> tuple[str, str]:
    """Address and token file of the cluster that `RAY_ADDRESS` names, else of the current one; empty for none.

    `with_engine`: for a step that drives a container engine.
    """
    if address := os.environ.get("RAY_ADDRESS"):
        return address, os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    found = None if with_engine else current_cluster(state)
    return (found.address, found.token_file) if found else ("", "")


def _path(state: State) -> Path:
    return state.dir / "cluster.json"
