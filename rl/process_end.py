"""The end of another process of this host, noticed when it happens, whoever its parent is."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def process_end(pid: int) -> Iterator[asyncio.Future[None]]:
    """A future that is done once the process has ended; where the system cannot tell (it is not Linux), never."""
    loop = asyncio.get_running_loop()
    end: asyncio.Future[None] = loop.create_future()
    try:
        descriptor = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else -1
    except ProcessLookupError:
        descriptor = -1
        end.set_result(None)
    except OSError:
        descriptor = -1
    if descriptor < 0:
        yield end
        return

    def ended() -> None:
        if not end.done():
            end.set_result(None)

    loop.add_reader(descriptor, ended)
    try:
        yield end
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
