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
        self._num_busy = 0
        """Generators with a piece of work."""
        self._trainer_s = self._generators_s = 0.0
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
        generator_s = self._generators_s / (len(self._work) - 1)
        rarer_s = min(self._trainer_s, self._any_generator_s)
        shares = Shares(
            duration_s=duration_s,
            trainer_idle=1 - self._trainer_s / duration_s if duration_s else 0.0,
            generator_idle=1 - generator_s / duration_s if duration_s else 0.0,
            overlap=self._both_s / rarer_s if rarer_s else 0.0,
        )
        self._trainer_s = self._generators_s = 0.0
        self._any_generator_s = self._both_s = 0.0
        self._began = self._since
        return shares

    @contextmanager
    def _piece(self, role: int) -> Iterator[None]:
        self._change(role, 1)
        try:
            yield
        finally:
            self._change(role, -1)

    def _change(self, role: int, pieces: int) -> None:
        self._add()
        before = bool(self._work[role])
        self._work[role] += pieces
        if role != -1:
            self._num_busy += bool(self._work[role]) - before

    def _add(self) -> None:
        now = self._clock()
        span_s, self._since = now - self._since, now
        # Sums, not a number for each generator: this is called for every group, and there may be a thousand generators.
        self._generators_s += span_s * self._num_busy
        self._any_generator_s += span_s * (self._num_busy > 0)
        if self._work[-1]:
            self._trainer_s += span_s
            self._both_s += span_s * (self._num_busy > 0)
