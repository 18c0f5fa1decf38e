"""How long each role was at work, and how long both at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rl.types import Frozen


class Shares(Frozen):
    """What the roles did in a span of time. Shares are 0 to 1."""

    duration_s: float
    trainer_idle: float
    generator_idle: float
    """Mean over the generators."""
    overlap: float
    """(busy trainer + busy generators - either) / the smaller: 1 when the rarer role never works alone."""


class BusyTime:
    """Adds up, at every beginning and end of work, the time since the one before."""

    def __init__(self, num_generators: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._work = [0] * (num_generators + 1)
        """[generators, trainer] pieces of work that go on."""
        self._busy_s = [0.0] * (num_generators + 1)
        self._any_generator_s = 0.0
        self._both_s = 0.0
        self._since = self._began = clock()

    @contextmanager
    def generator(self, number: int) -> Iterator[None]:
        """Work of one generator; several pieces may overlap."""
        with self._piece(number):
            yield

    @contextmanager
    def trainer(self) -> Iterator[None]:
        """Work of the trainer."""
        with self._piece(-1):
            yield

    def shares(self) -> Shares:
        """The time since the last call."""
        self._add()
        duration_s = self._since - self._began
        *generators_s, trainer_s = self._busy_s
        rarer_s = min(trainer_s, self._any_generator_s)
        shares = Shares(
            duration_s=duration_s,
            trainer_idle=1 - trainer_s / duration_s if duration_s else 0.0,
            generator_idle=1 - sum(generators_s) / len(generators_s) / duration_s if duration_s else 0.0,
            overlap=self._both_s / rarer_s if rarer_s else 0.0,
        )
        self._busy_s = [0.0] * len(self._busy_s)
        self._any_generator_s = self._both_s = 0.0
        self._began = self._since
        return shares

    @contextmanager
    def _piece(self, role: int) -> Iterator[None]:
        self._add()
        self._work[role] += 1
        try:
            yield
        finally:
            self._add()
            self._work[role] -= 1

    def _add(self) -> None:
        now = self._clock()
        span_s, self._since = now - self._since, now
        for role, pieces in enumerate(self._work):
            if pieces:
                self._busy_s[role] += span_s
        if any(self._work[:-1]):
            self._any_generator_s += span_s
            if self._work[-1]:
                self._both_s += span_s
