"""How a command reaches the runs: the local worker's gateway over a Unix socket, or Temporal where an address is given.

    command -> Connection.call -> LocalConnection: one JSON line -> gateway.sock -> one JSON line
                              '-> RemoteConnection: bridge.client.Client in this process (imports temporalio)

Both give plain JSON data, so that the quick path imports neither pydantic nor temporalio.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from bridge.cli.failure import Failure, Unreachable
from bridge.state import State

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 120.0
"""Longest wait for an answer, beyond what the call itself waits for."""
RECOVERY_LIMIT_S = 60.0
"""How long a broken connection is repaired before the command gives up."""
RECOVERY_PAUSE_S = 0.1

REPEATABLE = {"find", "progress", "report", "wait", "runs", "cancel", "explain"}
"""Methods that may be sent again when the connection broke before the answer came."""

TRANSIENT = {"RPCError", "TimeoutError"}
"""Errors that pass: Temporal is being restarted."""


class Lost(Exception):
    """The gateway is not there, or it went away before it answered."""

    def __init__(self, message: str, sent: bool) -> None:
        super().__init__(message, sent)
        self.sent = sent
        """True when the request may have been carried out."""

    def __str__(self) -> str:
        return str(self.args[0])


class CallError(Exception):
    """The other side refused: the kind of its error, and a sentence."""

    def __init__(self, kind: str, message: str, names: tuple[str, ...] = ()) -> None:
        super().__init__(kind, message, names)
        self.kind = kind
        self.message = message
        self.names = names
        """Of `SecretsNeeded`: the secrets that are not known where the steps run."""

    def __str__(self) -> str:
        return self.message


Waiting = Callable[[], AbstractContextManager[None]]


class Connection(Protocol):
    """Whoever carries out the calls of `bridge.client.Client`."""

    waiting: Waiting
    """Entered around every wait for somebody else; it may raise there, and only there, to interrupt a call."""

    def call(self, method: str, **arguments: Any) -> Any:
        """The answer as JSON data. Raises `CallError`, `Lost`, or `Unreachable` when no service can be reached."""

    def is_up(self) -> bool:
        """True when a call would be answered without starting anything."""

    def close(self) -> None:
        """Let go."""


def connect(address: str | None, namespace: str | None, task_queue: str | None) -> Connection:
    """Temporal at `address` or where its own configuration says, or else the local services.

    Nothing is started before the first call.
    """
    if address or is_configured():
        return RemoteConnection(address, namespace, task_queue)
    return LocalConnection(State.from_environment())


def is_configured() -> bool:
    """Whether the profile in use of Temporal's configuration file names an address. `Failure` without the profile."""
    folder = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    path = Path(os.environ.get("TEMPORAL_CONFIG_FILE") or Path(folder) / "temporalio" / "temporal.toml")
    profile = os.environ.get("TEMPORAL_PROFILE")
    if not path.is_file():
        if profile:
            raise Failure(
                f"TEMPORAL_PROFILE names `{profile}`, but there is no file `{path}`", "unset TEMPORAL_PROFILE"
            )
        return False
    import tomllib

    try:
        profiles = tomllib.loads(path.read_text()).get("profile", {})
    except ValueError as error:
        raise Failure(f"`{path}` is not valid TOML: {error}") from error
    if profile and profile not in profiles:
        known = ", ".join(f"`{name}`" for name in sorted(profiles)) or "none"
        raise Failure(f"TEMPORAL_PROFILE names `{profile}`, which `{path}` does not have", f"its profiles: {known}")
    return bool(profiles.get(profile or "default", {}).get("address"))


class LocalConnection:
    """The gateway of the local worker; a lost one is started again and the call repeated."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.waiting: Waiting = nullcontext

    def is_up(self) -> bool:
        """True when something listens on the gateway's socket."""
        try:
            self._open().close()
        except Lost:
            return False
        return True

    def call(self, method: str, **arguments: Any) -> Any:
        """See `Connection`. A call that must not run twice is repeated only if it was not sent."""
        give_up_at = time.monotonic() + RECOVERY_LIMIT_S
        while True:
            try:
                return self._call_once(method, arguments)
            except CallError as error:
                if error.kind not in TRANSIENT or method not in REPEATABLE or time.monotonic() > give_up_at:
                    raise
            except Lost as lost:
                if lost.sent and method not in REPEATABLE:
                    raise
                if time.monotonic() > give_up_at:
                    raise Unreachable(
                        f"the local services do not answer: {lost}",
                        f"see `orchestrate status` and the logs in `{self.state.logs_dir}`",
                    ) from lost
                if not self.is_up():
                    self.ensure()
                    continue
            time.sleep(RECOVERY_PAUSE_S)

    def ensure(self) -> None:
        """Start the local services, or wait until they are ready. `Unreachable` when they cannot be started."""
        from bridge import services

        try:
            with self.waiting():
                services.ensure(self.state)
        except services.ServiceError as error:
            raise Unreachable(str(error)) from error

    def close(self) -> None:
        """Every call has a socket of its own."""

    def _call_once(self, method: str, arguments: dict[str, Any]) -> Any:
        with self._open() as link:
            link.settimeout(ANSWER_TIMEOUT_S + arguments.get("wait_s", 0.0))
            try:
                link.sendall(json.dumps({"method": method, "arguments": arguments}).encode() + b"\n")
                with link.makefile("rb") as answers, self.waiting():
                    line = answers.readline()
            except OSError as error:
                raise Lost(f"`{self.state.gateway_socket}`: {error}", sent=True) from error
        if not line.endswith(b"\n"):
            raise Lost(f"`{self.state.gateway_socket}` was closed before the answer", sent=True)
        answer = json.loads(line)
        if refusal := answer.get("error"):
            raise CallError(refusal["kind"], refusal["message"], tuple(refusal.get("names", ())))
        return answer["result"]

    def _open(self) -> socket.socket:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.settimeout(CONNECT_TIMEOUT_S)
        try:
            link.connect(str(self.state.gateway_socket))
        except OSError as error:
            link.close()
            raise Lost(f"`{self.state.gateway_socket}`: {error.strerror or error}", sent=False) from error
        return link


class RemoteConnection:
    """A Temporal server somewhere else, through `bridge.client` in this process."""

    def __init__(self, address: str | None, namespace: str | None, task_queue: str | None) -> None:
        self.waiting: Waiting = nullcontext
        self._target: dict[str, Any] = {"address": address, "namespace": namespace, "task_queue": task_queue}
        self._client: Any = None
        self._loop: Any = None
        self._thread: Any = None

    def is_up(self) -> bool:
        """Nothing is ever started in this mode."""
        return True

    def call(self, method: str, **arguments: Any) -> Any:
        """See `Connection`. Temporal's own client connects again; calls that may be repeated are."""
        give_up_at = time.monotonic() + RECOVERY_LIMIT_S
        if self._client is None:
            self._client = self._connect()
        while True:
            try:
                return _plain(self._run(getattr(self._client, method)(**arguments)))
            except Exception as error:
                kind = type(error).__name__
                if kind not in TRANSIENT or method not in REPEATABLE or time.monotonic() > give_up_at:
                    names = error.args if kind == "SecretsNeeded" else ()
                    raise CallError(kind, str(error), names) from error
            time.sleep(RECOVERY_PAUSE_S)

    def close(self) -> None:
        """End what is still asked for, and the loop."""
        if self._loop is not None:
            self._run(_cancel_others())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(ANSWER_TIMEOUT_S)
            self._loop.close()
            self._loop = self._client = None

    def _connect(self) -> Any:
        try:
            return self._run(_connected(self._target))
        except Exception as error:
            place = f"`{self._target['address']}`" if self._target["address"] else "the configured address"
            raise Unreachable(
                f"cannot reach Temporal at {place}: {error}", "without an address the local services are used"
            ) from error

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        # The loop has a thread of its own: Ctrl-C then interrupts the wait here and never the loop.
        import asyncio
        import threading

        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="connection", daemon=True)
            self._thread.start()
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            with self.waiting():
                return future.result()
        finally:
            future.cancel()


async def _cancel_others() -> None:
    import asyncio

    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _connected(target: dict[str, Any]) -> Any:
    from bridge.client import Client

    return await Client.connect(**target)


def _plain(value: Any) -> Any:
    """Models as JSON data."""
    import dataclasses

    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
