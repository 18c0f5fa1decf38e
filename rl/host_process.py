"""A `Host` in a child process, with nothing but a socket pair between: `python -m rl.host_process DESCRIPTOR`.

    HostProcess.ask -> number, method, arguments -> child: Host.<method> -> number, result or exception -> answer

Many calls run at a time. A message is its length in eight bytes and a pickle; only the child that was started with the
other end can read or write it. A child ends when that end is gone, so it outlives nobody.
"""

import asyncio
import contextlib
import itertools
import os
import pickle
import signal
import socket
import sys
import traceback
from typing import Any

from rl.config import RunConfig
from rl.hosted import opened
from rl.hosting import Host, Kind, host_environment
from rl.stack import PartLost

_CLOSE_TIMEOUT_S = 15.0
_END_TIMEOUT_S = 5.0
_LENGTH_BYTES, _BUFFER_BYTES = 8, 1 << 24


class HostProcess:
    """One process and the part in it. Used from one event loop."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter
        self._reading: asyncio.Task[None]
        self._ended = ""
        """How, once it has."""

    async def prepare(self, config: RunConfig, kind: Kind) -> None:
        """Start it, with its imports done. Raises `PartLost`."""
        ours, theirs = socket.socketpair()
        with theirs:
            reader, self._writer = await asyncio.open_unix_connection(sock=ours, limit=_BUFFER_BYTES)
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "rl.host_process", str(theirs.fileno())),
                    pass_fds=[theirs.fileno()],
                    stdin=asyncio.subprocess.DEVNULL,
                    env={**os.environ, **host_environment(config, kind)},
                    # Ctrl-C is for the run, which ends its parts in order.
                    start_new_session=True,
                )
            except BaseException:
                self._writer.close()
                raise
        self._reading = asyncio.create_task(self._read(reader))
        await self.begin("prepare", config, kind)

    async def begin(self, method: str, *arguments: Any) -> Any:
        """A call that belongs to the opening, and so has a limit. Raises `PartLost`."""
        return await opened(self.ask(method, *arguments), self._name, method)

    async def call(self, method: str, *arguments: Any) -> Any:
        """What the part's method returns or raises. Raises `PartLost` when the process is gone."""
        return await self.ask("call", method, *arguments)

    async def ask(self, method: str, *arguments: Any) -> Any:
        """What the host's method returns or raises. Raises `PartLost` when the process is gone."""
        if self._ended:
            raise PartLost(self._ended)
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            self._writer.writelines(_as_message((number, method, arguments)))
            with contextlib.suppress(ConnectionError):
                await self._writer.drain()
            return await answer
        finally:
            del self._answers[number]

    async def close(self) -> None:
        """End the part, then the process, whether it answers or not."""
        if self._process is None:
            return
        try:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self.ask("close")
            self._writer.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _END_TIMEOUT_S)
        finally:
            await self._kill()

    async def _kill(self) -> None:
        """What the process had started ends with it."""
        process, self._process = self._process, None
        if process is None:
            return
        self._writer.close()
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        await self._reading

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Hand answers to those who wait, until the process ends."""
        assert self._process is not None
        process, how = self._process, ""
        try:
            while True:
                number, result, error = await _message(reader)
                answer = self._answers.get(number)
                if answer is None or answer.done():
                    continue
                if error is None:
                    answer.set_result(result)
                else:
                    answer.set_exception(error)
        except (EOFError, ConnectionError):
            with contextlib.suppress(TimeoutError):
                how = f"ended with code {await asyncio.wait_for(process.wait(), _END_TIMEOUT_S)}"
        except Exception as error:
            how = f"gave an answer that cannot be read: {type(error).__name__}: {error}"
        finally:
            how = how or "does not answer"
            self._ended = f"{self._name} (process {process.pid}) {how}"
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(PartLost(self._ended))


async def _message(reader: asyncio.StreamReader) -> Any:
    """The next one. Raises EOFError or ConnectionError at the end."""
    length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES))
    return pickle.loads(await reader.readexactly(length))


def _as_message(content: Any) -> tuple[bytes, bytes]:
    pickled = pickle.dumps(content)
    return len(pickled).to_bytes(_LENGTH_BYTES), pickled


async def _serve(descriptor: int) -> None:
    """Do what is asked until nobody can ask any more."""
    reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=descriptor), limit=_BUFFER_BYTES)
    host, running = Host(), set[asyncio.Task[None]]()

    async def answer(number: int, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            message = _as_message((number, await getattr(host, method)(*arguments), None))
        except Exception as error:
            # What comes of it is told by whoever asked, who sees no stack of this process otherwise.
            error.add_note(traceback.format_exc())
            message = _as_message((number, None, _sendable(error)))
        writer.writelines(message)
        with contextlib.suppress(ConnectionError):
            await writer.drain()

    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            task = asyncio.create_task(answer(*await _message(reader)))
            running.add(task)
            task.add_done_callback(running.discard)
    # Who wanted an orderly end has asked for it; for nobody, nothing that still computes may keep the process.
    sys.stdout.flush()
    os._exit(0)


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        plain.add_note(traceback.format_exc())
        return plain
    return error


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
