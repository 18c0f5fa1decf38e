"""Weights by one-sided reads of the trainer's memory: RDMA where the machines have it, TCP elsewhere.

The trainer's slots are registered with Monarch once; an actor knows which is newest. A generator reads that slot into
its own buffer without the trainer's help, then the slot's stamp: a version that is no longer there was overwritten.
"""

import asyncio
import uuid
from collections.abc import Mapping
from typing import Any

import torch
from monarch.actor import Actor, endpoint, this_host
from monarch.rdma import RDMABuffer
from torch import Tensor

from rl.stack import WeightsLost
from rl.weights import NUM_SLOTS, Header, Manifest, Pulled, TornRead, WeightsMissing, WeightStoreHandle

_TIMEOUT_S = 60


def create() -> WeightStoreHandle:
    """A store of its own; its actor lives in a process of this host, which ends with this process."""
    name = f"weights_{uuid.uuid4().hex[:12]}"
    processes = this_host().spawn_procs(per_host={"procs": 1}, name=f"procs_{name}")
    return WeightStoreHandle(transport="monarch_rdma", place=name, mailbox=processes.spawn(name, Mailbox))


def remove(handle: WeightStoreHandle) -> None:
    """Stop the actor."""
    handle.mailbox.stop().get()


class Mailbox(Actor):  # type: ignore[misc]  # Monarch has no types
    """Knows the newest slot of the trainer that lives."""

    def __init__(self) -> None:
        self._newest: tuple[Header, Manifest, Any, Any] | None = None

    @endpoint  # type: ignore[untyped-decorator]
    async def put(self, header: Header, manifest: Manifest, data: Any, stamp: Any) -> None:
        """A slot has been filled."""
        self._newest = header, manifest, data, stamp

    @endpoint  # type: ignore[untyped-decorator]
    async def newest(self) -> tuple[Header, Manifest, Any, Any] | None:
        """The newest version."""
        return self._newest


class _Slot:
    """Registered memory for one version. The stamp is the version, -1 while it is being written."""

    def __init__(self, manifest: Manifest) -> None:
        self.buffer = torch.empty(manifest.num_bytes, dtype=torch.uint8)
        self.stamp = torch.full((1,), -1, dtype=torch.int64)
        self.remote_buffer = RDMABuffer(self.buffer)
        self.remote_stamp = RDMABuffer(self.stamp.view(torch.uint8))


class Writer:
    """The trainer's end; made in an actor."""

    def __init__(self, handle: WeightStoreHandle, manifest: Manifest) -> None:
        self._mailbox = handle.mailbox
        self._manifest = manifest
        self._slots = [_Slot(manifest) for _ in range(NUM_SLOTS)]
        self._number = -1
        self._header: Header | None = None

    def snapshot(self, header: Header, state: Mapping[str, Tensor]) -> None:
        """Into the oldest slot."""
        self._number = (self._number + 1) % NUM_SLOTS
        slot = self._slots[self._number]
        slot.stamp.fill_(-1)
        self._manifest.pack(state, slot.buffer)
        slot.stamp.fill_(header.version)
        self._header = header

    async def push(self) -> int:
        """Only the place of the slot is told."""
        slot = self._slots[self._number]
        call = self._mailbox.put.call_one(self._header, self._manifest, slot.remote_buffer, slot.remote_stamp)
        await asyncio.wait_for(_done(call), _TIMEOUT_S)
        return self._manifest.num_bytes

    def close(self) -> None:
        """The memory goes with the process."""


class Reader:
    """A generator's end; made in an actor."""

    def __init__(self, handle: WeightStoreHandle) -> None:
        self._handle = handle
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._stamp = torch.empty(1, dtype=torch.int64)

    async def pull(self, version: int) -> Pulled:
        """Read the newest slot into this process's buffer. Raises `WeightsLost`."""
        found = await asyncio.wait_for(_done(self._handle.mailbox.newest.call_one()), _TIMEOUT_S)
        if found is None or found[0].version < version:
            has = f"version {found[0].version}" if found else "no weights yet"
            raise WeightsMissing(f"store `{self._handle.place}` has {has}, wanted {version} or newer")
        header, manifest, data, stamp = found
        if self._buffer.numel() != manifest.num_bytes:
            self._buffer = torch.empty(manifest.num_bytes, dtype=torch.uint8)
        try:
            await _done(data.read_into(self._buffer, timeout=_TIMEOUT_S))
            await _done(stamp.read_into(self._stamp.view(torch.uint8), timeout=_TIMEOUT_S))
        except Exception as error:
            # The memory is the trainer's; Monarch has no error of its own for a process that is gone.
            raise WeightsLost(f"version {header.version} cannot be read from its trainer: {error}") from error
        if (there := int(self._stamp)) != header.version:
            raise TornRead(f"version {header.version} was overwritten{f' by {there}' if there >= 0 else ''}")
        return Pulled(header, manifest.views(self._buffer), manifest.num_bytes)

    def close(self) -> None:
        """The memory goes with the process."""


async def _done(future: Any) -> Any:
    """Monarch's futures can be awaited but are no coroutines, which time limits want."""
    return await future
