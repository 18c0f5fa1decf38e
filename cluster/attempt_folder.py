"""The folder of an attempt from both ends: read by offset on the node, written at the offset beside the worker."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

from cluster.moved import from_copy
from steps import Frozen, StepResult
from steps._files import HOST, PROGRESS, read_json, read_result, write_whole

LOGS = ("stdout.log", "stderr.log", "structured.jsonl")
COPY = "copy.json"
"""Says that the attempt works in a copy of its plan's folder."""
LARGEST_CHUNK = 1 << 20
"""Bytes of one log in one answer."""
_EVIDENCE_S = 86_400.0


class Cursor(Frozen):
    """What the caller has already: bytes of each of `LOGS`, and the progress it knows."""

    offsets: tuple[int, int, int] = (0, 0, 0)
    progress: str = ""


class Poll(Frozen):
    """What there is beyond a cursor."""

    known: bool = True
    """False when this actor never ran the attempt, or has forgotten it."""
    busy: bool = False
    """True when a start was refused because another attempt runs here."""
    chunks: tuple[bytes, bytes, bytes] = (b"", b"", b"")
    progress: str = ""
    """Content of `progress.json`."""
    result: StepResult | None = None
    """Set when the attempt has ended and `chunks` are the last bytes of its logs."""
    stuck: bool = False
    """The attempt was ended by force and the process that ran it is of no further use."""
    node: str = ""
    pid: int = 0
    away: bool = False
    """True when a start was refused because the node does not share the plan's folder, and has no copy of it yet."""
    copy_dir: str = ""
    """The copy of the plan's folder that the attempt worked in, on a node that does not share it."""
    begun: bool | None = True
    """False when the actor's folder shows that it never began the attempt, None when there is no such folder."""


def attempts_root() -> Path:
    """Folder on a node that holds the attempts of all step actors of this user; readable by nobody else."""
    root = Path(tempfile.gettempdir()) / f"orchestrate-steps-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.stat().st_uid != os.getuid() or root.is_symlink():
        raise PermissionError(f"`{root}` belongs to somebody else\n\nhint: remove it, or set TMPDIR for the Ray node")
    return root


def within(actor_folder: Path, key: str) -> Path:
    """Folder of an attempt within its actor's."""
    return actor_folder / hashlib.sha256(key.encode()).hexdigest()[:32]


def sweep(root: Path) -> None:
    """Remove folders of long gone actors that hold no attempt; a dead actor's is evidence of what it began."""
    for folder in root.iterdir():
        with contextlib.suppress(FileNotFoundError):
            is_old = time.time() - folder.stat().st_mtime > _EVIDENCE_S
            if is_old and not any(path.is_dir() for path in folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)


def note_copy(folder: Path, plan_dir: str, copy_dir: Path) -> None:
    """Say that the attempt in `folder` works in a copy of its plan's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / COPY, json.dumps({"plan_dir": plan_dir, "copy_dir": str(copy_dir)}))


def read_beyond(folder: Path, cursor: Cursor, *, ended: bool) -> Poll:
    """New log bytes and progress. `ended` must have been true before this call for the result to be given."""
    chunks = tuple(_read(folder / name, offset) for name, offset in zip(LOGS, cursor.offsets, strict=True))
    complete = all(len(chunk) < LARGEST_CHUNK for chunk in chunks)
    try:
        progress = (folder / PROGRESS).read_text()
    except FileNotFoundError:
        progress = ""
    result = read_result(folder) if ended and complete else None
    copy = read_json(folder / COPY) if result else None
    if result and copy:
        result = from_copy(result, copy["copy_dir"], copy["plan_dir"])
    return Poll(
        chunks=(chunks[0], chunks[1], chunks[2]),
        progress=progress,
        result=result,
        copy_dir=copy["copy_dir"] if copy else "",
        begun=(folder / HOST).exists() or (False if folder.parent.is_dir() else None),
    )


def local_cursor(folder: Path) -> Cursor:
    """Cursor of what has been copied into `folder`."""
    sizes = [path.stat().st_size if path.exists() else 0 for path in (folder / name for name in LOGS)]
    return Cursor(offsets=(sizes[0], sizes[1], sizes[2]))


def write_at(folder: Path, cursor: Cursor, poll: Poll) -> Cursor:
    """Copy the chunks of `poll` to where they belong; the cursor behind them.

    Two writers of the same bytes do no harm: everything is written at its offset.
    """
    for name, offset, chunk in zip(LOGS, cursor.offsets, poll.chunks, strict=True):
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            written = 0
            while written < len(chunk):
                written += os.pwrite(descriptor, chunk[written:], offset + written)
        finally:
            os.close(descriptor)
    sizes = [offset + len(chunk) for offset, chunk in zip(cursor.offsets, poll.chunks, strict=True)]
    return Cursor(offsets=(sizes[0], sizes[1], sizes[2]), progress=poll.progress)


def last_line(chunk: bytes) -> str:
    """The last line of a piece of log that has text, cut to 200 characters."""
    lines = chunk[-2000:].decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def progress_fields(text: str) -> tuple[str, float | None]:
    """Text and fraction of a `progress.json`."""
    try:
        value = json.loads(text) if text else {}
    except json.JSONDecodeError:
        return "", None
    fraction = value.get("fraction")
    return str(value.get("text", "")), float(fraction) if isinstance(fraction, int | float) else None


def _read(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(LARGEST_CHUNK)
    except FileNotFoundError:
        return b""
