"""Links without a framework: a plain copy in one process, and stores between this process and a child of it."""

import asyncio
import multiprocessing
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from typing import Any

from torch import Tensor

from rl.bench.links import Ask, Link, LinkName, Move
from rl.bench.links.ends import Receiver, Sender, StoreLink, check, copy, fill, new_state

_ANSWER_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 10.0


class MemoryCopy:
    """The limit: the same bytes from one place to another in the memory of one process."""

    def __init__(self) -> None:
        self._source: dict[str, Tensor] = {}
        self._target: dict[str, Tensor] = {}

    async def open(self, num_bytes: int) -> None:
        """Both places."""
        self._source, self._target = new_state(num_bytes), new_state(num_bytes)

    async def move(self, version: int) -> Move:
        """One copy."""
        fill(self._source, version)
        seconds = copy(self._source, self._target)
        check(self._target, version)
        return Move(seconds=seconds, copy_s=0.0)

    async def close(self) -> None:
        """Neither place."""
        self._source, self._target = {}, {}


class ReceiverProcess:
    """A `Receiver` in a child of this process, which ends with it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    async def ask(self, method: str, *arguments: Any) -> Any:
        """What its method returns or raises; nothing else goes on here meanwhile. Raises TimeoutError."""
        self._connection.send((method, arguments))
        if not self._connection.poll(_ANSWER_TIMEOUT_S):
            raise TimeoutError(f"`{method}` is not done after {_ANSWER_TIMEOUT_S:g} s")
        answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(_END_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(_END_TIMEOUT_S)


def _serve(connection: "Connection[Any, Any]") -> None:
    receiver = Receiver()
    with asyncio.Runner() as runner:
        while True:
            try:
                method, arguments = connection.recv()
            except EOFError:
                return
            try:
                connection.send(runner.run(getattr(receiver, method)(*arguments)))
            except Exception as error:
                connection.send(error)


@asynccontextmanager
async def open_link(name: LinkName, most_bytes: int) -> AsyncIterator[Link]:
    """The link of this name."""
    if name == "memory_copy":
        yield MemoryCopy()
        return
    sender, receiver = Sender(), ReceiverProcess()

    async def ask(method: str, *arguments: Any) -> Any:
        return await getattr(sender, method)(*arguments)

    sender_ask: Ask = ask
    try:
        yield StoreLink(name, sender_ask, receiver.ask)
    finally:
        receiver.close()
