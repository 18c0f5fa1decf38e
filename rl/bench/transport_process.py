"""The process that drives one transport, and the asking of it.

    TransportProcess.moves(num_bytes, repeats) -> child: Link.open, warm-up, Link.move x repeats -> [Move]

The child lives on one end of a socket pair and ends when the other end is gone; what it has begun is killed with it.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from rl.bench.links import LinkName, Move, open_link

_START_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 15.0
_WARM_UP = 4
"""Moves that are not measured: a store has three slots, whose pages are all to be touched."""


class TransportFailed(Exception):
    """The child has no numbers. The argument says why."""


class TransportProcess:
    """A child that drives one link."""

    def __init__(self, name: LinkName, most_bytes: int) -> None:
        """Start it for weights of at most this size. Raises `TransportFailed`."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        self._connection, theirs = Pipe()
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        root = str(Path(__file__).parents[2])
        environment = {
            **inherited,
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            # Ray ends workers when the machine's memory is nearly full; here nobody takes more than was asked for.
            "RAY_memory_monitor_refresh_ms": "0",
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rl.bench.transport_process", str(theirs.fileno()), name, str(most_bytes)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                env=environment,
                start_new_session=True,
            )
        try:
            self._answer(_START_TIMEOUT_S)
        except TransportFailed:
            self.close()
            raise

    def moves(self, num_bytes: int, repeats: int, timeout_s: float) -> list[Move]:
        """What the moves took, the first ones left out where the size is another than before. Raises
        `TransportFailed`."""
        try:
            self._connection.send((num_bytes, repeats))
        except OSError:
            raise TransportFailed(self._ended()) from None
        moves: list[Move] = self._answer(timeout_s)
        return moves

    def close(self) -> None:
        """End the child, and what it has begun where it does not end that itself."""
        self._connection.close()
        begun = _descendants(self._process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_TIMEOUT_S)
        if self._process.poll() is None:
            begun += _descendants(self._process.pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(_END_TIMEOUT_S)
        _, alive = psutil.wait_procs(begun, timeout=_END_TIMEOUT_S if begun else 0)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _answer(self, timeout_s: float) -> Any:
        try:
            if not self._connection.poll(timeout_s):
                raise TransportFailed(f"no answer within {timeout_s:g} s")
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise TransportFailed(self._ended()) from None
        if isinstance(answer, str):
            raise TransportFailed(answer)
        return answer

    def _ended(self) -> str:
        try:
            code: int | str = self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "the process does not answer"
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"the process ended with code {code}: {said[-1] if said else 'it said nothing'}"


def _descendants(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


async def _serve(connection: "Connection[Any, Any]", name: LinkName, most_bytes: int) -> None:
    async with open_link(name, most_bytes) as link:
        connection.send([])
        opened, version = 0, 0
        while True:
            try:
                num_bytes, repeats = await asyncio.to_thread(connection.recv)
            except EOFError:
                break
            if num_bytes != opened:
                if opened:
                    await link.close()
                await link.open(num_bytes)
                opened = num_bytes
                for _ in range(_WARM_UP):
                    version += 1
                    await link.move(version)
            moves = []
            for _ in range(repeats):
                version += 1
                moves.append(await link.move(version))
            connection.send(moves)
        if opened:
            await link.close()


def main() -> None:
    """A child: drives a link for as long as somebody asks."""
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    name: Any = sys.argv[2]
    try:
        asyncio.run(_serve(connection, name, int(sys.argv[3])))
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send(f"{type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    main()
