"""A small process beside each step actor: when the actor dies, what its step had started dies with it.

It waits on the actor's pid from outside the actor's process tree, so it survives `kill -9` of the actor and of the
node's Ray processes.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
from pathlib import Path

from cluster.plan_copies import remove_unused
from steps._files import read_json, write_whole
from steps._process import kill_leftovers
from steps._request import StepRequest

_CURRENT = "current.json"
"""Names the attempt that runs in the actor."""


def start(folder: Path) -> None:
    """Start the process for the calling actor, whose folder on the node is `folder`."""
    argv = [sys.executable, "-m", "cluster.orphans", str(os.getpid()), str(folder)]
    # The shell exits at once: its child is nobody's child here, and a step's end does not end it.
    command = ["/bin/sh", "-c", '"$@" </dev/null >/dev/null 2>&1 &', "sh", *argv]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])}
    subprocess.run(command, start_new_session=True, cwd="/", env=environment, check=True, timeout=10)


def kept_key(actor: str) -> str:
    """What processes carry, in the place of a step's key, that live as long as the actor."""
    return f"actor/{actor}"


def announce(folder: Path, request: StepRequest) -> None:
    """Say which attempt is about to run."""
    write_whole(folder / _CURRENT, json.dumps({"step_key": request.step_key, "attempt": request.attempt}))


def end_leftovers(step_key: str, attempt: int) -> None:
    """Kill what the attempt and earlier ones left on this machine; a later one may be running already."""
    kill_leftovers(step_key, before_attempt=attempt + 1)


def main() -> None:
    """Wait for the actor's end, then end its orphans."""
    actor_pid, folder = int(sys.argv[1]), Path(sys.argv[2])
    with contextlib.suppress(ProcessLookupError):
        poller = select.poll()
        poller.register(os.pidfd_open(actor_pid), select.POLLIN)
        poller.poll()
    kill_leftovers(kept_key(folder.name))
    if current := read_json(folder / _CURRENT):
        end_leftovers(current["step_key"], current["attempt"])
    remove_unused(folder.parent)


if __name__ == "__main__":
    main()
