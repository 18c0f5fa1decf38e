"""Weights through Ray's object store: shared memory within a node, Ray's transfer between nodes.

The trainer puts each version there as one object; an actor keeps the references of the newest ones, so that readers
find them. Objects never change, so a read is never torn. They go with the trainer that put them; the next one publishes
anew.
"""

import asyncio
import ctypes
import uuid
from collections.abc import Mapping
from typing import Any

import numpy
import ray
import torch
from ray.exceptions import ObjectLostError
from torch import Tensor

from rl.stack import WeightsLost
from rl.weights import NUM_SLOTS, Header, Manifest, Pulled, WeightsMissing, WeightStoreHandle

_TIMEOUT_S = 60.0
_OWNED: dict[str, Any] = {}
"""Place -> its actor, which ends with this process, however that ends."""


def create() -> WeightStoreHandle:
    """A store of its own on the cluster this process is connected to."""
    name = f"weights-{uuid.uuid4().hex[:12]}"
    mailbox: Any = ray.remote(Mailbox)
    place = f"{ray.get_runtime_context().namespace}/{name}"
    _OWNED[place] = mailbox.options(name=name, num_cpus=0, max_restarts=-1).remote()
    return WeightStoreHandle(transport="ray_objects", place=place)


def remove(handle: WeightStoreHandle) -> None:
    """End the actor; the objects are freed with its references."""
    ray.kill(_OWNED.pop(handle.place), no_restart=True)


class Mailbox:
    """Keeps the references of the newest versions. Becomes a Ray actor."""

    def __init__(self) -> None:
        self._kept: list[tuple[Header, list[Any]]] = []

    def put(self, header: Header, manifest: Manifest, reference: list[Any]) -> None:
        """Keep one more version; `reference` is in a list, or Ray would resolve it."""
        self._manifest = manifest
        self._kept = [*self._kept, (header, reference)][-NUM_SLOTS:]

    def newest(self) -> tuple[Header, Manifest, list[Any]] | None:
        """The newest version."""
        return (self._kept[-1][0], self._manifest, self._kept[-1][1]) if self._kept else None


class Writer:
    """The trainer's end; its process is connected to the cluster."""

    def __init__(self, handle: WeightStoreHandle, manifest: Manifest) -> None:
        self._mailbox = _mailbox(handle)
        self._manifest = manifest
        self._buffer = torch.empty(manifest.num_bytes, dtype=torch.uint8)
        self._header: Header | None = None

    def snapshot(self, header: Header, state: Mapping[str, Tensor]) -> None:
        """Into this process's own buffer."""
        self._manifest.pack(state, self._buffer)
        self._header = header

    async def push(self) -> int:
        """Put it into the store and tell the actor."""
        reference = await asyncio.to_thread(ray.put, self._buffer.numpy())
        call = self._mailbox.put.remote(self._header, self._manifest, [reference])
        await _within_limit(call)
        return self._manifest.num_bytes

    def close(self) -> None:
        """What was pushed stays."""


class Reader:
    """A generator's end; its process is connected to the cluster."""

    def __init__(self, handle: WeightStoreHandle) -> None:
        self._handle = handle
        self._held: Any = None

    async def pull(self, version: int) -> Pulled:
        """Map the newest version; it is copied only from another node. Raises `WeightsLost`."""
        found = await _within_limit(_mailbox(self._handle).newest.remote())
        if found is None or found[0].version < version:
            has = f"version {found[0].version}" if found else "no weights yet"
            raise WeightsMissing(f"store `{self._handle.place}` has {has}, wanted {version} or newer")
        header, manifest, (reference,) = found
        try:
            array: numpy.ndarray[Any, Any] = await _within_limit(reference)
        except ObjectLostError:
            raise WeightsLost(f"version {header.version} is gone with the trainer that put it there") from None
        self._held = array
        return Pulled(header, manifest.views(_as_tensor(array)), manifest.num_bytes)

    def close(self) -> None:
        """Let go of the last version."""
        self._held = None


def _mailbox(handle: WeightStoreHandle) -> Any:
    namespace, _, name = handle.place.rpartition("/")
    return ray.get_actor(name, namespace)


def _as_tensor(array: "numpy.ndarray[Any, Any]") -> Tensor:
    """The array's memory. Ray's arrays are read-only, which torch cannot express; whoever pulls only reads."""
    memory = (ctypes.c_uint8 * array.nbytes).from_address(array.ctypes.data)
    return torch.frombuffer(memory, dtype=torch.uint8)


async def _within_limit(reference: Any) -> Any:
    return await asyncio.wait_for(reference.as_future(), _TIMEOUT_S)
