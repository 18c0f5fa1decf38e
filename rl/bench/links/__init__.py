"""One way that weights travel between two processes, as the transport benchmark drives it.

    open(num_bytes) -> move(version), move(version + 1), ... -> close      in the trainer's process and another

`local` has what needs no framework, `ray` and `monarch` have their actors. Light: imports no torch, ray or monarch.
"""

from collections.abc import Awaitable
from contextlib import AbstractAsyncContextManager
from importlib import import_module
from typing import Any, Literal, Protocol

from rl.types import Frozen

LinkName = Literal[
    "memory_copy",
    "shared_memory",
    "file",
    "ray_objects",
    "ray_direct",
    "ray_message",
    "monarch_rdma",
    "monarch_message",
]
LINKS: dict[LinkName, str] = {
    "memory_copy": "local",
    "shared_memory": "local",
    "file": "local",
    "ray_objects": "ray",
    "ray_direct": "ray",
    "ray_message": "ray",
    "monarch_rdma": "monarch",
    "monarch_message": "monarch",
}
"""Name -> module of this package."""


class Move(Frozen):
    """One version that came over."""

    seconds: float
    """From the trainer's memory until the other process can read all of it; the message that it is there included."""
    copy_s: float
    """What the other process then needs to copy it into memory of its own, that nobody else can write to."""


class Link(Protocol):
    """Both ends of one transport. Used from one event loop."""

    async def open(self, num_bytes: int) -> None:
        """Make weights of this size in the trainer's process, and room for them in the other."""
        ...

    async def move(self, version: int) -> Move:
        """Change the trainer's weights and bring them over; ValueError where others arrive."""
        ...

    async def close(self) -> None:
        """Free the memory of both."""
        ...


class Ask(Protocol):
    """A call to an end, which lives in another process or in this one."""

    def __call__(self, method: str, *arguments: Any) -> Awaitable[Any]:
        """What the end's method returns or raises."""
        ...


def open_link(name: LinkName, most_bytes: int) -> AbstractAsyncContextManager[Link]:
    """The processes of a link for weights of at most this size."""
    opened: AbstractAsyncContextManager[Link] = import_module(f"{__name__}.{LINKS[name]}").open_link(name, most_bytes)
    return opened
