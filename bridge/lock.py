"""The lock of a state directory: whoever holds it may start and end services. Ends with the process that holds it."""

import fcntl
import os
import time
from collections.abc import Callable

from bridge.state import State

POLL_S = 0.01


def take(state: State, timeout_s: float, give_up: Callable[[], bool] = lambda: False) -> int | None:
    """The descriptor that holds the lock; None when somebody else held it too long or `give_up` says so."""
    descriptor = os.open(state.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline or give_up():
                os.close(descriptor)
                return None
            time.sleep(POLL_S)
