"""Forks one process per step attempt, in milliseconds, from a small process that has the step code loaded.

    worker --(socket: request file + one end of a pipe)--> spawner --fork--> session of its own: Host.run

The child holds its end of the pipe until it exits, so the worker sees its end as an end of file. A worker that dies
takes the spawner with it (its socket closes) but none of the steps: they are sessions of their own.
"""

import gc
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

from steps._host import run_isolated
from steps._registry import step_types

_LONGEST_MESSAGE = 65_536


def serve(control: socket.socket) -> None:
    """Fork for each request until the other side closes."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for name in ("command", "python"):
        _ = step_types()[name].params
    gc.freeze()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, _LONGEST_MESSAGE, 1)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            _run_child(Path(message.decode()))
        for descriptor in descriptors:
            os.close(descriptor)


def _run_child(request_file: Path) -> None:
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        run_isolated(request_file)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def main() -> None:
    """Entry point: the argument is the inherited file descriptor of the control socket."""
    os.chdir("/")
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
