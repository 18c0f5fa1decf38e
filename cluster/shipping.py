"""What goes to and comes from a node that does not share the worker's files: a plan's folder there, artifacts back.

Everything goes in pieces through calls of the step actor, as logs do: no copy rests in Ray's object store or in the
head's memory, and what dies on the way leaves nothing behind but a temporary file of its own.
"""

import asyncio
import contextlib
import hashlib
import os
import stat
import uuid
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.lease import Place
from cluster.package import Packer
from cluster.remote import call, on_node
from steps import Frozen, StepRequest
from steps._artifacts import file_hash

_PIECE = 4 << 20
"""Bytes in one call."""
_CALL_S = 60.0
_UNPACK_S = 300.0

_packer = Packer()
_packing = asyncio.Lock()
_sending: dict[tuple[str, str], asyncio.Lock] = {}
"""By node and content: of many actors on a node, one receives, the others wait for it."""


class ArtifactError(Exception):
    """A file that the step has promised did not come back as it was made."""


class Piece(Frozen):
    """Part of a file."""

    data: bytes
    mode: int
    """Permissions of the file."""


async def send_folder(actor: Any, place: Place, request: StepRequest) -> str:
    """Bring the plan's folder to the actor's node unless it is there; the hash of its content.

    Raises `PackageError`, `TimeoutError` and Ray's errors.
    """
    async with _packing:
        package = await asyncio.to_thread(_packer.pack, request)
    async with _sending.setdefault((place.node_id, package.hash), asyncio.Lock()):
        if await call(actor.holds.remote(package.hash), _CALL_S):
            return package.hash
        for offset in range(0, package.size, _PIECE):
            data = await asyncio.to_thread(package.read, offset, _PIECE)
            await call(actor.receive.remote(offset, data), _CALL_S)
        await call(actor.unpack.remote(package.hash), _UNPACK_S)
    return package.hash


async def fetch_artifacts(place: Place, copy_dir: str, plan_dir: Path, artifacts: dict[str, str]) -> None:
    """Bring the files a step has promised from its node's copy of the plan's folder, each whole or not at all.

    What is there with the same hash is not fetched. Raises `ArtifactError`, `OSError`, `TimeoutError`, Ray's errors.
    """
    for name, wanted in artifacts.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ArtifactError(
                f"the artifact `{name}` lies outside of the plan's folder, on a node that shares no files\n\n"
                "hint: write it into the plan's folder, where steps start"
            )
        target = plan_dir / name
        if not await asyncio.to_thread(_is_there, target, wanted):
            await _fetch(place, f"{copy_dir}/{name}", target, wanted)


async def _fetch(place: Place, source: str, target: Path, wanted: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex[:8]}")
    digest = hashlib.sha256()
    try:
        with temporary.open("xb") as file:
            while True:
                piece: Piece = await call(on_node(_read, place.node_id, source, file.tell()), _CALL_S)
                digest.update(piece.data)
                await asyncio.to_thread(file.write, piece.data)
                if len(piece.data) < _PIECE:
                    break
            os.fchmod(file.fileno(), piece.mode)
        if (got := f"sha256:{digest.hexdigest()}") != wanted:
            raise ArtifactError(f"the artifact `{target}` has changed since the step ended: got {got}, wanted {wanted}")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: str, offset: int) -> Piece:
    """On the node: a piece of a file."""
    with Path(path).open("rb") as file:
        data = os.pread(file.fileno(), _PIECE, offset)
        return Piece(data=data, mode=stat.S_IMODE(os.fstat(file.fileno()).st_mode))


def _is_there(path: Path, wanted: str) -> bool:
    with contextlib.suppress(OSError):
        return file_hash(path) == wanted
    return False
