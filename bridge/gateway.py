"""A door to the worker's `Client` for the command line: a Unix socket, so that the CLI need not import Temporal.

One JSON line in: `{"method", "arguments"}`; one out: `{"result"}` or `{"error": {"kind", "message", ...}}`. Only the
user who owns the state directory can open it.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from bridge.client import Client, SecretsNeeded
from bridge.problems import PlanError

METHODS = frozenset({"submit", "find", "progress", "report", "wait", "runs", "cancel", "retry", "explain"})
_LONGEST_LINE = 64 * 1024 * 1024


class Gateway:
    """Serves one client on one socket until closed."""

    def __init__(self, client: Client, path: Path) -> None:
        self._client = client
        self._path = path
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Listen. The socket appears under its name only when it answers."""
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        before = os.umask(0o077)
        try:
            self._server = await asyncio.start_unix_server(self._serve, temporary, limit=_LONGEST_LINE)
        finally:
            os.umask(before)
        temporary.rename(self._path)

    async def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                answer = await self._answer(line)
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            if request["method"] not in METHODS:
                raise ValueError(f"no method `{request['method']}`")
            result = await getattr(self._client, request["method"])(**request.get("arguments", {}))
            return {"result": _plain(result)}
        except PlanError as error:
            problems = [_plain(problem) for problem in error.problems]
            return {"error": {"kind": "PlanError", "message": str(error), "problems": problems}}
        except SecretsNeeded as error:
            return {"error": {"kind": "SecretsNeeded", "message": "secrets are missing", "names": list(error.args)}}
        except Exception as error:
            return {"error": {"kind": type(error).__name__, "message": str(error) or repr(error)}}


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
