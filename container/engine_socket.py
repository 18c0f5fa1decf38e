"""The few calls of the Docker Engine for programs that must start fast: its socket, spoken to without the SDK.

container.worker (one a Ray actor), container.reaper -> EngineSocket -> /var/run/docker.sock
"""

import http.client
import json
import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

TIMEOUT_S = 60.0
NOT_FOUND = 404
"""Status of an answer about a container that there is none of."""
_DEFAULT = "unix:///var/run/docker.sock"


class EngineError(Exception):
    """The engine refused a call, or does not answer; the text is what it said."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status
        """HTTP status of the answer, 0 when there was none."""


class EngineSocket:
    """The engine on this machine. Every call opens a connection of its own and raises `EngineError`."""

    def __init__(self, env: Mapping[str, str], timeout_s: float = TIMEOUT_S) -> None:
        """`DOCKER_HOST` of `env` may name another socket; an engine elsewhere cannot run what shares our processes.

        `timeout_s` is how long one call may stay silent.
        """
        self._timeout_s = timeout_s
        address = env.get("DOCKER_HOST") or _DEFAULT
        if not address.startswith("unix://"):
            raise EngineError(f"`DOCKER_HOST` is `{address}`, wanted the socket of this machine's engine: `unix://...`")
        self._path = address.removeprefix("unix://")

    def create(self, name: str, config: Mapping[str, Any]) -> None:
        """Make a container; `config` is the body of the engine's own call."""
        self._call("POST", f"/containers/create?name={quote(name)}", config)

    def start(self, name: str) -> None:
        """Start a container that was made."""
        self._call("POST", f"/containers/{quote(name)}/start")

    def wait(self, name: str, timeout_s: float | None = None) -> int:
        """Exit code of a container; blocks until it has ended, at most `timeout_s`."""
        connection = self._send("POST", f"/containers/{quote(name)}/wait", None, timeout_s)
        code: int = json.loads(self._read(connection))["StatusCode"]
        return code

    def inspect(self, name: str) -> dict[str, Any]:
        """All about a container."""
        found: dict[str, Any] = json.loads(self._call("GET", f"/containers/{quote(name)}/json"))
        return found

    def inspect_image(self, name: str) -> dict[str, Any]:
        """All about an image that is here."""
        found: dict[str, Any] = json.loads(self._call("GET", f"/images/{quote(name)}/json"))
        return found

    def list_with_label(self, label: str) -> list[dict[str, Any]]:
        """Containers, ended ones too, that carry `label`, with or without `=value`."""
        filters = quote(json.dumps({"label": [label]}))
        found: list[dict[str, Any]] = json.loads(self._call("GET", f"/containers/json?all=true&filters={filters}"))
        return found

    def last_lines(self, name: str, count: int) -> str:
        """The end of both output streams."""
        data = self._call("GET", f"/containers/{quote(name)}/logs?stdout=true&stderr=true&tail={count}")
        text, position = b"", 0
        # Each piece is headed by its stream, three zero bytes and its length.
        while position + 8 <= len(data):
            length = int.from_bytes(data[position + 4 : position + 8], "big")
            text += data[position + 8 : position + 8 + length]
            position += 8 + length
        return text.decode(errors="replace").strip()

    def ask_to_end(self, name: str) -> None:
        """SIGTERM to a container; nothing happens when it is gone or does not run."""
        try:
            self._call("POST", f"/containers/{quote(name)}/kill?signal=SIGTERM")
        except EngineError as error:
            if error.status not in (NOT_FOUND, 409):
                raise

    def stop(self, name: str, grace_s: int) -> None:
        """Ask a container to end, and kill it when it has not after `grace_s`; nothing happens when it has ended."""
        self._call("POST", f"/containers/{quote(name)}/stop?t={grace_s}")

    def remove(self, name: str) -> None:
        """Kill and remove a container; nothing happens when it is gone, or somebody else is removing it."""
        try:
            self._call("DELETE", f"/containers/{quote(name)}?force=true&v=true")
        except EngineError as error:
            if error.status not in (NOT_FOUND, 409):
                raise

    def _call(self, method: str, path: str, body: Any = None) -> bytes:
        return self._read(self._send(method, path, body, self._timeout_s))

    def _send(self, method: str, path: str, body: Any, timeout_s: float | None) -> "_Connection":
        connection = _Connection(self._path, self._timeout_s)
        try:
            connection.connect()
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": "application/json"} if content else {})
            assert connection.sock is not None
            connection.sock.settimeout(timeout_s)
        except OSError as error:
            connection.close()
            raise EngineError(f"no Docker Engine answers at `unix://{self._path}`: {error}") from error
        return connection

    def _read(self, connection: "_Connection") -> bytes:
        try:
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"the Docker Engine at `unix://{self._path}` does not answer: {error}") from error
        finally:
            connection.close()
        if response.status >= 400:
            raise EngineError(_message(data), response.status)
        return data


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _message(data: bytes) -> str:
    try:
        return str(json.loads(data)["message"])
    except (ValueError, KeyError, TypeError):
        return data.decode(errors="replace").strip()
