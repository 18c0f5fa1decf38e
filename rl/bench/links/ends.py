"""The two ends of a link: the weights in the trainer's memory, and who wants them in another process.

    Sender.prepare -> send -> [ rl.transports ] -> Receiver.receive        with a store
    Sender.prepare -> tell -> [ a message ] -----> Receiver.take           without one

Times are of the machine's monotonic clock, which all its processes share.
"""

import time
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from rl.bench.links import Ask, Move
from rl.hosting import weight_store
from rl.types import Frozen
from rl.weights import Header, Manifest, WeightReader, WeightStoreHandle, WeightWriter, open_reader, open_writer

_NUM_TENSORS = 16
_PAGE_ELEMENTS = 1024
"""One element of every page of memory is compared."""


class Arrival(Frozen):
    """Weights that can be read by who wanted them."""

    at_s: float
    copy_s: float


class Address(Protocol):
    """Another end, as one of its framework's messages reaches it."""

    @property
    def ask(self) -> Ask:
        """Call it."""
        ...


def new_state(num_bytes: int) -> dict[str, Tensor]:
    """Tensors of this size together, their pages touched; by one thread, as a role with one core has it."""
    torch.set_num_threads(1)
    shape = num_bytes // _NUM_TENSORS // 4
    return {f"layers.{number}.weight": torch.full((shape,), -1.0) for number in range(_NUM_TENSORS)}


def fill(state: Mapping[str, Tensor], version: int) -> None:
    """Weights as an update would leave them: all other than before."""
    for tensor in state.values():
        tensor.fill_(version)


def copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> float:
    """Copy all tensors; seconds."""
    began = time.perf_counter()
    for name, tensor in target.items():
        tensor.copy_(source[name])
    return time.perf_counter() - began


def check(state: Mapping[str, Tensor], version: int) -> None:
    """Raises ValueError where a page is not of this version."""
    for name, tensor in state.items():
        found = torch.cat([tensor[::_PAGE_ELEMENTS], tensor[-1:]])
        if not bool((found == version).all()):
            raise ValueError(f"`{name}` is `{float(found.min())}` to `{float(found.max())}`, wanted version {version}")


class Sender:
    """The trainer's end."""

    def __init__(self) -> None:
        self._state: dict[str, Tensor] = {}
        self._writer: WeightWriter | None = None
        self._version = -1

    async def open(self, num_bytes: int, handle: WeightStoreHandle | None = None) -> None:
        """Make the weights, and open the store where there is one."""
        self._state = new_state(num_bytes)
        if handle is not None:
            self._writer = open_writer(handle, Manifest.of(self._state))

    async def prepare(self, version: int) -> None:
        """An update happened."""
        fill(self._state, version)
        self._version = version

    async def send(self) -> float:
        """Publish the weights to the store; when that began."""
        assert self._writer is not None, "there is no store"
        began = time.perf_counter()
        self._writer.snapshot(Header(version=self._version), self._state)
        await self._writer.push()
        return began

    async def tell(self, receiver: Address) -> Move:
        """Send the weights in a message."""
        began = time.perf_counter()
        arrival: Arrival = await receiver.ask("take", self._state, self._version)
        return Move(seconds=arrival.at_s - began, copy_s=arrival.copy_s)

    async def close(self) -> None:
        """Free the memory."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None
        self._state = {}


class Receiver:
    """The other process's end."""

    def __init__(self) -> None:
        self._own: dict[str, Tensor] = {}
        self._reader: WeightReader | None = None

    async def open(self, num_bytes: int, handle: WeightStoreHandle | None = None) -> None:
        """Make room, and open the store where there is one."""
        self._own = new_state(num_bytes)
        if handle is not None:
            self._reader = open_reader(handle)

    async def receive(self, version: int) -> Arrival:
        """What the store has."""
        assert self._reader is not None, "there is no store"
        pulled = await self._reader.pull(version)
        arrival = await self.take(pulled.tensors, version)
        pulled.check()
        return arrival

    async def take(self, state: Mapping[str, Tensor], version: int) -> Arrival:
        """What a message brought."""
        at_s = time.perf_counter()
        copy_s = copy(state, self._own)
        check(self._own, version)
        return Arrival(at_s=at_s, copy_s=copy_s)

    async def close(self) -> None:
        """Free the memory."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None
        self._own = {}


class StoreLink:
    """By one of the project's own transports, told apart as in a run: the loop asks the one, then the other."""

    def __init__(self, transport: Any, sender: Ask, receiver: Ask) -> None:
        self._transport = transport
        self._sender = sender
        self._receiver = receiver
        self._store: Any = None

    async def open(self, num_bytes: int) -> None:
        """A store of its own for every size."""
        self._store = weight_store(self._transport)
        handle = self._store.__enter__()
        await self._sender("open", num_bytes, handle)
        await self._receiver("open", num_bytes, handle)

    async def move(self, version: int) -> Move:
        """Publish, then pull."""
        await self._sender("prepare", version)
        began: float = await self._sender("send")
        arrival: Arrival = await self._receiver("receive", version)
        return Move(seconds=arrival.at_s - began, copy_s=arrival.copy_s)

    async def close(self) -> None:
        """Remove the store."""
        try:
            await self._receiver("close")
            await self._sender("close")
        finally:
            self._store.__exit__(None, None, None)


class MessageLink:
    """By a message of the trainer to the other process."""

    def __init__(self, sender: Ask, receiver: Address) -> None:
        self._sender = sender
        self._receiver = receiver

    async def open(self, num_bytes: int) -> None:
        """Both ends."""
        await self._sender("open", num_bytes)
        await self._receiver.ask("open", num_bytes)

    async def move(self, version: int) -> Move:
        """The trainer's process measures, because it sends."""
        await self._sender("prepare", version)
        move: Move = await self._sender("tell", self._receiver)
        return move

    async def close(self) -> None:
        """Both ends."""
        await self._receiver.ask("close")
        await self._sender("close")
