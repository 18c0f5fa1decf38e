"""What the steps of one actor keep for the next: objects by name, and the processes that came with them.

Such a process carries the actor's key instead of the step's, so neither the step's end nor a later attempt of it ends
the process; the actor's end does.
"""

import os
import threading
from collections.abc import Callable
from typing import Any

from steps._process import STEP_KEY_VARIABLE, descendants, identity_of, is_alive, marked

_ATTEMPT = 1
"""Keys end in the number of an attempt; an actor has but one life."""


class Kept:
    """The objects of one actor. `step_key` is what its processes carry; see `kill_leftovers`."""

    def __init__(self, step_key: str) -> None:
        self.step_key = step_key
        self._values: dict[str, Any] = {}
        self._processes: list[dict[str, Any]] = []
        self._lock = threading.RLock()

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The object under `name`, made if need be. An error of `make` keeps nothing."""
        with self._lock:
            if name not in self._values:
                before = {process.pid for process in descendants(os.getpid())}
                self._values[name] = self._made(make)
                started = {process.pid for process in descendants(os.getpid())} - before
                self._processes += [identity_of(pid) for pid in started]
            return self._values[name]

    def pids(self) -> set[int]:
        """Processes that live on when a step ends."""
        self._processes = [process for process in self._processes if is_alive(process)]
        kept = {int(process["pid"]) for process in self._processes}
        return kept.union(*({child.pid for child in descendants(pid)} for pid in kept))

    def _made(self, make: Callable[[], Any]) -> Any:
        key, before = f"{self.step_key}/{_ATTEMPT}", os.environ.get(STEP_KEY_VARIABLE)
        os.environ[STEP_KEY_VARIABLE] = key
        try:
            with marked(key):
                return make()
        finally:
            if before is None:
                os.environ.pop(STEP_KEY_VARIABLE, None)
            else:
                os.environ[STEP_KEY_VARIABLE] = before
