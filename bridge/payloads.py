"""Payloads too large for Temporal's history, as files named by the hash of their content.

The driver under `codec`: Temporal keeps the hash, the folder keeps the bytes. Client and workers must see the same
folder, wherever each has it mounted. A file that is missing or damaged is fatal for whoever needs it.
"""

import asyncio
import contextlib
import hashlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from google.protobuf.message import DecodeError
from temporalio.api.common.v1 import Payload
from temporalio.converter import (
    StorageDriver,
    StorageDriverClaim,
    StorageDriverRetrieveContext,
    StorageDriverStoreContext,
)

from bridge.state import State

PAYLOAD_DIR_VARIABLE = "ORCHESTRATE_PAYLOAD_DIR"
STORED_FROM_BYTES = 256 * 1024
"""Payloads of this size and over go to a file."""
_HASH = re.compile(r"[0-9a-f]{64}")
_PRUNED = ".pruned-"
_TEMPORARY = ".new-"
_TEMPORARY_MAX_AGE_S = 3600.0


class PayloadFileError(Exception):
    """The file of a large payload is missing, damaged or cannot be written."""


class FileStorageDriver(StorageDriver):
    """Stores payloads as `<folder>/<first two digits>/<sha256>`, mode 0600."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def name(self) -> str:
        """Name of the driver in Temporal's history."""
        return "orchestrate-files"

    def type(self) -> str:
        """Kind of the driver in any language."""
        return "orchestrate.files"

    async def store(self, context: StorageDriverStoreContext, payloads: Sequence[Payload]) -> list[StorageDriverClaim]:
        """Write each payload to its file, or find it there."""
        return [await asyncio.to_thread(self._store, payload) for payload in payloads]

    async def retrieve(
        self, context: StorageDriverRetrieveContext, claims: Sequence[StorageDriverClaim]
    ) -> list[Payload]:
        """Read each payload back; `PayloadFileError` when it is not what was stored."""
        return [await asyncio.to_thread(self._retrieve, claim.claim_data.get("sha256", "")) for claim in claims]

    def _store(self, payload: Payload) -> StorageDriverClaim:
        data = payload.SerializeToString(deterministic=True)
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(digest)
        try:
            if not _renewed(path, len(data)):
                _write(path, data)
        except OSError as error:
            raise PayloadFileError(
                f"a payload of {len(data)} bytes cannot be written to `{self._folder}`: {error}\n\n"
                f"hint: `{PAYLOAD_DIR_VARIABLE}` names the folder"
            ) from error
        return StorageDriverClaim({"sha256": digest, "size": str(len(data))})

    def _retrieve(self, digest: str) -> Payload:
        if not _HASH.fullmatch(digest):
            raise PayloadFileError(f"a reference to a large payload has the hash `{digest}`, wanted 64 hex digits")
        path = self._path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise PayloadFileError(
                f"the file of a large payload is missing: `{path}`\n\n"
                f"hint: clients and workers must share one folder (`{PAYLOAD_DIR_VARIABLE}`); "
                "files of runs older than the retention are removed"
            ) from None
        except OSError as error:
            raise PayloadFileError(f"the file of a large payload cannot be read: {error}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise _damaged(path, len(data))
        # A run that goes on reads its payloads again and again: age counts from the last use.
        with contextlib.suppress(OSError):
            os.utime(path)
        try:
            return Payload.FromString(data)
        except DecodeError:
            raise _damaged(path, len(data)) from None

    def _path(self, digest: str) -> Path:
        return self._folder / digest[:2] / digest


def payload_dir(state: State, environment: Mapping[str, str] = os.environ) -> Path:
    """`$ORCHESTRATE_PAYLOAD_DIR`, by default `payloads` in the state directory."""
    configured = environment.get(PAYLOAD_DIR_VARIABLE)
    return Path(configured).expanduser().absolute() if configured else state.dir / "payloads"


def prune(folder: Path, max_age_s: float) -> int:
    """Remove files that nobody has written or read for `max_age_s` seconds; how many.

    Which files runs still refer to cannot be known here: choose an age over the longest run plus Temporal's retention.
    Safe beside drivers that store and read.
    """
    oldest = time.time() - max_age_s
    oldest_temporary = time.time() - _TEMPORARY_MAX_AGE_S
    count = 0
    for path in folder.glob("??/*"):
        with contextlib.suppress(FileNotFoundError):
            modified_at = path.stat().st_mtime
            if _HASH.fullmatch(path.name):
                count += modified_at < oldest and _pruned(path, oldest)
            elif path.name.startswith((_PRUNED, _TEMPORARY)) and modified_at < oldest_temporary:
                path.unlink()
    return count


def _pruned(path: Path, oldest: float) -> bool:
    """Move the file away first: a driver that renews it in between is seen by its time, one that comes after writes."""
    aside = path.with_name(f"{_PRUNED}{path.name}")
    path.rename(aside)
    if aside.stat().st_mtime >= oldest:
        aside.rename(path)
        return False
    aside.unlink()
    return True


def _renewed(path: Path, size: int) -> bool:
    """True when the file is there whole; its age starts again."""
    try:
        os.utime(path)
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _write(path: Path, data: bytes) -> None:
    path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            # History is about to refer to this file: it must outlive a power failure as history does.
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _damaged(path: Path, size: int) -> PayloadFileError:
    return PayloadFileError(
        f"the file of a large payload is damaged: `{path}` ({size} bytes) does not have the hash of its name\n\n"
        "hint: remove it and start the run again"
    )
