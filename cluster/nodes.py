"""The nodes of a cluster as Ray sees them, asked by a process of its own: `python -m cluster.nodes ADDRESS TOKEN_FILE`.

A process of its own, because Ray leaves threads behind, prints, and may end the process that uses it.
"""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from steps import Frozen

_TIMEOUT_S = 60.0
_HIDDEN = ("node:", "object_store_memory", "accelerator_type:")
_GROUP = "ray.io/node-group"


class NodesError(Exception):
    """The cluster did not tell."""


class Node(Frozen):
    """One Ray node."""

    node_id: str
    address: str
    """IP address."""
    type: str
    """Node type of the cluster file: its label `node-type`, else the one Ray gives."""
    alive: bool
    image: str
    """Its label `image`; empty when it does not run in an image of ours."""
    labels: dict[str, str]
    resources: dict[str, float]
    """All it has: `CPU`, `GPU`, `memory` (bytes), custom ones."""
    why_dead: str = ""


def list_nodes(address: str, token_file: Path | None) -> list[Node]:
    """The nodes of the cluster at `address`, dead ones that Ray remembers too. Raises `NodesError`."""
    argv = [sys.executable, "-m", "cluster.nodes", address, str(token_file or "")]
    own = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [own, os.environ.get("PYTHONPATH")]))}
    try:
        done = subprocess.run(
            argv, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise NodesError(f"the cluster at `{address}` does not answer within {_TIMEOUT_S:g} s") from error
    lines = done.stdout.splitlines()
    if not lines:
        raise NodesError(f"the cluster at `{address}` could not be asked: {done.stderr.strip()[-500:]}")
    answer = json.loads(lines[-1])
    if "error" in answer:
        raise NodesError(answer["error"])
    return [Node.model_validate(node) for node in answer["nodes"]]


def _node(found: dict[str, Any]) -> Node:
    labels = found.get("Labels") or {}
    resources = {
        name: amount for name, amount in (found.get("Resources") or {}).items() if not name.startswith(_HIDDEN)
    }
    return Node(
        node_id=found["NodeID"],
        address=found["NodeManagerAddress"],
        type=labels.get("node-type") or labels.get(_GROUP, ""),
        alive=found["Alive"],
        image=labels.get("image", ""),
        labels=labels,
        resources=resources,
        why_dead=found.get("DeathReasonMessage") or "",
    )


async def _ask(address: str, token_file: Path | None) -> dict[str, Any]:
    from cluster.connect import ClusterError, connect

    try:
        await connect(address, token_file)
    except ClusterError as error:
        return {"error": str(error)}
    import ray

    nodes = await asyncio.to_thread(ray.nodes)
    return {"nodes": [_node(found).model_dump() for found in nodes]}


def main() -> None:
    """Print one JSON line."""
    address, token = sys.argv[1:3]
    # Ray prints to stdout now and then; our line must stay alone.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(asyncio.run(_ask(address, Path(token) if token else None))), file=output, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
