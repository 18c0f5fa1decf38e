"""Weights by version number, from the trainer's memory into an engine's, by one of several transports.

    Trainer: snapshot(version, state) -> push          Generator: pull(version) -> engine -> check
                        '-------- slots, newest version first --------'

`snapshot` is all the trainer waits for. There are several slots, so publishing waits for no reader either; one that
is overtaken finds out by the version in the slot's header (`TornRead`) and pulls again, what is newest then.
"""

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from rl.config import TransportName
from rl.tokenizer import Tokenizer, encode_messages
from rl.types import Frozen

NUM_SLOTS = 3
"""A reader has time for so many publications, less one."""
_ALIGNMENT = 64


class WeightsMissing(Exception):
    """The store holds no version as new as the one asked for."""


class TornRead(Exception):
    """The weights were overwritten while they were read; pull again."""


class Entry(Frozen):
    """One tensor in the buffer."""

    name: str
    """As in the checkpoint of the model."""
    dtype: str
    """Such as `float32`."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the buffer."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return math.prod(self.shape) * dtype.itemsize


class Manifest(Frozen):
    """Which tensors a buffer holds, and where; the same for every version of a model."""

    entries: tuple[Entry, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the buffer."""
        last = self.entries[-1]
        return _aligned(last.offset + last.num_bytes)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "Manifest":
        """Of a state dict, in its order. Tensors that share their memory (a tied head) are there once."""
        entries: list[Entry] = []
        seen: set[tuple[int, tuple[int, ...]]] = set()
        offset = 0
        for name, tensor in state.items():
            if (identity := (tensor.data_ptr(), tuple(tensor.shape))) in seen:
                continue
            seen.add(identity)
            dtype = str(tensor.dtype).removeprefix("torch.")
            entry = Entry(name=name, dtype=dtype, shape=tuple(tensor.shape), offset=offset)
            entries.append(entry)
            offset = _aligned(offset + entry.num_bytes)
        return cls(entries=tuple(entries))

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Name -> tensor in `buffer`, uint8 [num_bytes]; nothing is copied."""
        return {
            entry.name: buffer[entry.offset : entry.offset + entry.num_bytes]
            .view(getattr(torch, entry.dtype))
            .view(entry.shape)
            for entry in self.entries
        }

    def pack(self, state: Mapping[str, Tensor], buffer: Tensor) -> None:
        """Copy the tensors of a state dict into `buffer`."""
        pack(state, self.views(buffer))


class Header(Frozen):
    """What travels with every version."""

    version: int
    probe: tuple[float, ...] = ()
    """Log-probabilities of `probe_tokens` under the trainer's own forward pass: what the engine must agree with."""


class Pulled:
    """One version in this process's memory: valid until the next pull, and true once `check` returned."""

    def __init__(self, header: Header, tensors: Mapping[str, Tensor], num_bytes: int) -> None:
        self.header = header
        self.tensors = tensors
        self.num_bytes = num_bytes

    def check(self) -> None:
        """Raises `TornRead` when the tensors may have been overwritten since the pull."""


class WeightWriter(Protocol):
    """The trainer's end of a store."""

    def snapshot(self, header: Header, state: Mapping[str, Tensor]) -> None:
        """Copy the weights aside; they may change afterwards."""
        ...

    async def push(self) -> int:
        """Let readers see the last snapshot; its size in bytes."""
        ...

    def close(self) -> None:
        """Let go of it; what was pushed stays readable where the transport can do that."""
        ...


class WeightReader(Protocol):
    """A generator's end of a store."""

    async def pull(self, version: int) -> Pulled:
        """The newest weights. Raises `WeightsMissing` when they are older than `version`, and `TornRead`."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class WeightStoreHandle(Frozen):
    """Names a store; small, and all that a process needs to open its end."""

    transport: TransportName
    place: str
    """A file, a folder or the name of an actor, as the transport has it."""
    mailbox: Any = Field(None, repr=False)
    """The Monarch actor that knows the buffers (`monarch_rdma` alone)."""


def pack(state: Mapping[str, Tensor], views: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a state dict into those of the same names."""
    with torch.no_grad():
        for name, view in views.items():
            view.copy_(state[name])


def open_writer(handle: WeightStoreHandle, manifest: Manifest) -> WeightWriter:
    """The trainer's end."""
    writer: WeightWriter = _transport(handle).Writer(handle, manifest)
    return writer


def open_reader(handle: WeightStoreHandle) -> WeightReader:
    """A generator's end; the writer need not be there yet."""
    reader: WeightReader = _transport(handle).Reader(handle)
    return reader


def probe_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """A conversation that trainer and engine score to be compared; always the same for a tokenizer.

    Text that a model expects: on tokens at random, float32 itself may be wrong by more than the limit of the
    comparison. A normalised log-probability depends on the whole head, whatever the token.
    """
    asked = encode_messages(tokenizer, [{"role": "user", "content": "What is the zorplex value of 'cat'?"}])
    answered = tokenizer.encode("LOOKUP[cat]\n[Result: 42]\n[ANSWER] 42", add_special_tokens=False)
    return (*asked, *answered)


def largest_difference(expected: Sequence[float], found: Sequence[float]) -> float:
    """Largest absolute difference in nats; infinite where the lengths differ or a number is none."""
    if len(expected) != len(found):
        return math.inf
    differences = [abs(one - other) for one, other in zip(expected, found, strict=True)]
    return math.inf if any(math.isnan(each) for each in differences) else max(differences, default=0.0)


def _transport(handle: WeightStoreHandle) -> Any:
    return import_module(f"rl.transports.{handle.transport}")


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
