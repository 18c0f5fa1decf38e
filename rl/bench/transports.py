"""How fast weights travel: every transport in turns, several times over, beside a plain copy of the same bytes.

    measure_transports -> for every size: [ memory_copy, shared_memory, ... ] x rounds -> Transport, Transport, ...

One thread for each end, as a role with one core has it. What fails is written down and hinders no other.
"""

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Self

import psutil

from rl.bench.links import LINKS, LinkName, Move
from rl.bench.results import Transport
from rl.bench.transport_process import TransportFailed, TransportProcess

MEGABYTE = 1 << 20
SIZES = tuple(size * MEGABYTE for size in (1, 4, 16, 64, 256, 1024))
QUICK_SIZES = (1 * MEGABYTE, 16 * MEGABYTE)
_ROUNDS = 3
_STARTS_AT_ONCE = 4
_LARGE_BYTES = 256 * MEGABYTE
"""From this size on, a process ends after its turn, so that the next one finds the memory free."""
_MOST_COPIES = 9
"""Of the weights at once: the trainer's, what a store keeps, what a reader has."""
_SLOWEST_BYTES_PER_S = 20 * MEGABYTE
_TURN_TIMEOUT_S = 60.0
"""For a turn of weights without size."""


def measure_transports(quick: bool, sizes: Sequence[int] = ()) -> list[Transport]:
    """All transports, by size; `sizes` in bytes, by default 1 MB to 1 GB, or 1 and 16 MB where it is to be `quick`."""
    chosen = sorted(sizes or (QUICK_SIZES if quick else SIZES))
    found = _Found()
    small = [size for size in chosen if size < _LARGE_BYTES]
    if small:
        with _Processes(small[-1]) as processes:
            for num_bytes in small:
                for _ in range(_ROUNDS):
                    for name in found.left(num_bytes):
                        try:
                            found.add(name, num_bytes, _turn(processes[name], num_bytes))
                        except TransportFailed as failure:
                            found.fail(name, num_bytes, failure)
                            processes.end(name)
    for num_bytes in chosen[len(small) :]:
        for _ in range(_ROUNDS):
            for name in found.left(num_bytes):
                try:
                    _check_memory(num_bytes)
                    with TransportProcess(name, num_bytes) as process:
                        found.add(name, num_bytes, _turn(process, num_bytes))
                except TransportFailed as failure:
                    found.fail(name, num_bytes, failure)
    return [found.transport(name, num_bytes) for num_bytes in chosen for name in LINKS]


class _Processes:
    """One for each transport, begun together; one that is ended begins anew when it is asked for."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._living: dict[LinkName, TransportProcess] = {}

    def __enter__(self) -> Self:
        with ThreadPoolExecutor(_STARTS_AT_ONCE) as threads, suppress(TransportFailed):
            list(threads.map(self.__getitem__, LINKS))
        return self

    def __exit__(self, *_: object) -> None:
        with ThreadPoolExecutor(_STARTS_AT_ONCE) as threads:
            list(threads.map(self.end, list(self._living)))

    def __getitem__(self, name: LinkName) -> TransportProcess:
        """Raises `TransportFailed`."""
        if name not in self._living:
            self._living[name] = TransportProcess(name, self._most_bytes)
        return self._living[name]

    def end(self, name: LinkName) -> None:
        """End it, if it lives."""
        if name in self._living:
            self._living.pop(name).close()


class _Found:
    def __init__(self) -> None:
        self._moves: dict[tuple[LinkName, int], list[Move]] = defaultdict(list)
        self._errors: dict[tuple[LinkName, int], str] = {}

    def add(self, name: LinkName, num_bytes: int, moves: list[Move]) -> None:
        self._moves[name, num_bytes] += moves

    def fail(self, name: LinkName, num_bytes: int, failure: TransportFailed) -> None:
        self._errors[name, num_bytes] = str(failure)

    def left(self, num_bytes: int) -> list[LinkName]:
        """Those that have not failed at this size."""
        return [name for name in LINKS if (name, num_bytes) not in self._errors]

    def transport(self, name: LinkName, num_bytes: int) -> Transport:
        moves = self._moves[name, num_bytes]
        return Transport(
            name=name,
            num_bytes=num_bytes,
            seconds=tuple(move.seconds for move in moves),
            copy_s=tuple(move.copy_s for move in moves),
            error=self._errors.get((name, num_bytes), ""),
        )


def _turn(process: TransportProcess, num_bytes: int) -> list[Move]:
    repeats = max(1, min(5, (512 * MEGABYTE) // num_bytes))
    moves = repeats + 4
    return process.moves(num_bytes, repeats, _TURN_TIMEOUT_S + moves * num_bytes / _SLOWEST_BYTES_PER_S)


def _check_memory(num_bytes: int) -> None:
    free, wanted = psutil.virtual_memory().available, _MOST_COPIES * num_bytes
    if free < wanted:
        raise TransportFailed(f"{free / 2**30:.1f} GB of memory are free, wanted {wanted / 2**30:.1f} GB")
