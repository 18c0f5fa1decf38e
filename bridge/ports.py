"""Free TCP ports for the local services, kept across restarts so that clients find a restarted service again."""

import random
import socket
import time

FIRST, LAST = 20000, 32000
"""Below the range from which the kernel takes ports for outgoing connections, above that of Ray's workers."""

ATTEMPTS = 1000
POLL_S = 0.01


def is_free(port: int) -> bool:
    """Whether a server could listen on `port`, on loopback and on every interface."""
    for host in ("127.0.0.1", ""):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                return False
    return True


def assign(names: tuple[str, ...], remembered: object, patience_s: float = 0.0) -> dict[str, int]:
    """A free port for each name: the remembered one when it is, or within `patience_s` becomes, free.

    Who was killed holds its port a moment longer. `OSError` when no port can be found.
    """
    ports: dict[str, int] = {}
    deadline = time.monotonic() + patience_s
    for name in names:
        port = remembered.get(name) if isinstance(remembered, dict) else None
        while isinstance(port, int) and 1024 <= port <= 65535 and not is_free(port) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        for _ in range(ATTEMPTS):
            if isinstance(port, int) and 1024 <= port <= 65535 and port not in ports.values() and is_free(port):
                break
            port = random.randint(FIRST, LAST)
        else:
            raise OSError(f"no free port between {FIRST} and {LAST}")
        ports[name] = port
    return ports
