"""The supervisor's socket: one JSON line in, one JSON line out, then the connection is closed."""

import contextlib
import json
import os
import selectors
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONGEST_REQUEST_BYTES = 65536
LONGEST_SILENCE_S = 5.0

Handler = Callable[[socket.socket, dict[str, Any]], None]
"""Takes a connection and the request on it; answers with `send`, now or later."""


class ControlSocket:
    """Listens at a path (0600) and hands whole requests to a handler; driven by the owner's selector.

    What it registers there carries the function to call as its data.
    """

    def __init__(self, path: Path, selector: selectors.BaseSelector, handler: Handler) -> None:
        self._path = path
        self._selector = selector
        self._handler = handler
        self._silent: dict[socket.socket, float] = {}
        # Whatever is at the path is nobody's any more: we hold the lock of the state directory.
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(mask)
        self._listener.listen(128)
        self._listener.setblocking(False)
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def close(self) -> None:
        """Take no more requests."""
        self._selector.unregister(self._listener)
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def hang_up_on_silence(self) -> None:
        """Drop clients that connected and said nothing."""
        for connection, since in list(self._silent.items()):
            if time.monotonic() - since > LONGEST_SILENCE_S:
                self._release(connection)
                connection.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            received = bytearray()
            self._silent[connection] = time.monotonic()
            self._selector.register(connection, selectors.EVENT_READ, lambda: self._receive(connection, received))

    def _receive(self, connection: socket.socket, received: bytearray) -> None:
        try:
            data = connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        received += data
        if data and b"\n" not in received and len(received) <= LONGEST_REQUEST_BYTES:
            return
        self._release(connection)
        if not data:
            connection.close()
            return
        try:
            request = json.loads(received)
        except ValueError:
            request = None
        self._handler(connection, request if isinstance(request, dict) else {})

    def _release(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._silent[connection]


def send(connection: socket.socket, answer: dict[str, Any]) -> None:
    """Answer and hang up; a client that went away is no concern of ours."""
    with contextlib.suppress(OSError), connection:
        connection.settimeout(1.0)
        connection.sendall(json.dumps(answer).encode() + b"\n")
