"""Copies of plans' folders on a node that does not share them: one for each content, for all steps of the node.

    copies/<hash>/       the folder; what steps write there stays until the copy goes
    copies/<hash>.lock   held by every actor that works with the copy

A copy goes when no living actor works with it any more: at the end of an actor, and when one takes another copy.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tarfile
import uuid
from pathlib import Path, PurePosixPath

from cluster.manifest import Manifest


class PlanCopies:
    """The copies of this node as one actor sees them; it works with at most one at a time."""

    def __init__(self, attempts_root: Path) -> None:
        self._folder = copies_folder(attempts_root)
        self._root = attempts_root
        self._held: tuple[str, int] | None = None
        self._incoming: Path | None = None

    def hold(self, content_hash: str) -> Path | None:
        """The copy with this content, kept from now on; None when there is none."""
        path = self._folder / content_hash
        if self._held is not None and self._held[0] == content_hash:
            return path
        lock = _lock(self._folder / f"{content_hash}.lock", fcntl.LOCK_SH) if path.is_dir() else None
        if lock is None:
            return None
        if not path.is_dir():
            os.close(lock)
            return None
        self._keep(content_hash, lock)
        return path

    def receive(self, offset: int, data: bytes) -> None:
        """Take the next piece of an archive; one at offset 0 begins a new one."""
        if offset == 0 or self._incoming is None:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._drop_incoming()
            self._incoming = self._folder / f".{uuid.uuid4().hex}.tar"
        with self._incoming.open("ab") as file:
            if file.tell() != offset:
                raise ValueError(f"got a piece for offset {offset}, wanted {file.tell()}")
            file.write(data)

    def unpack(self, content_hash: str) -> None:
        """Make a copy of what was received, and keep it. Raises `ValueError` when it is not what was announced."""
        assert self._incoming is not None
        unpacked = self._folder / f".{uuid.uuid4().hex}"
        lock = None
        try:
            found = _unpack(self._incoming, unpacked)
            if found != content_hash:
                raise ValueError(f"got a folder with the hash {found}, wanted {content_hash}")
            while lock is None:
                lock = _lock(self._folder / f"{content_hash}.lock", fcntl.LOCK_SH, wait=True)
            # Another actor may have been quicker.
            with contextlib.suppress(OSError):
                unpacked.rename(self._folder / content_hash)
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)
            self._drop_incoming()
        self._keep(content_hash, lock)

    def _keep(self, content_hash: str, lock: int) -> None:
        if self._held is not None:
            os.close(self._held[1])
            self._held = None
            remove_unused(self._root)
        self._held = content_hash, lock

    def _drop_incoming(self) -> None:
        if self._incoming is not None:
            self._incoming.unlink(missing_ok=True)
            self._incoming = None


def remove_unused(attempts_root: Path) -> None:
    """Remove the copies that no living actor works with."""
    folder = copies_folder(attempts_root)
    for lock_file in folder.glob("*.lock") if folder.is_dir() else ():
        lock = _lock(lock_file, fcntl.LOCK_EX)
        if lock is not None:
            shutil.rmtree(lock_file.with_suffix(""), ignore_errors=True)
            lock_file.unlink(missing_ok=True)
            os.close(lock)


def copies_folder(attempts_root: Path) -> Path:
    """Where the copies lie on a node."""
    return attempts_root / "copies"


def _lock(path: Path, how: int, *, wait: bool = False) -> int | None:
    """A file descriptor with the lock; None when somebody has one that does not go with it, or has just removed it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, how if wait else how | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino == path.stat().st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def _unpack(archive_file: Path, folder: Path) -> str:
    """Unpack an archive of `cluster.package`; the hash of what was in it. Raises `ValueError` for a name outside it."""
    manifest = Manifest()
    folder.mkdir(mode=0o700)
    with tarfile.open(archive_file) as archive:
        for entry in archive:
            if PurePosixPath(entry.name).is_absolute() or ".." in PurePosixPath(entry.name).parts:
                raise ValueError(f"the archive has an entry `{entry.name}`")
            path = folder / entry.name
            path.parent.mkdir(parents=True, exist_ok=True)
            if entry.isdir():
                path.mkdir(exist_ok=True)
                manifest.add(entry.name, "folder")
            elif entry.issym():
                path.symlink_to(entry.linkname)
                manifest.add(entry.name, "link", content=entry.linkname)
            else:
                content = archive.extractfile(entry)
                assert content is not None
                data = content.read()
                path.write_bytes(data)
                path.chmod(entry.mode)
                os.utime(path, (entry.mtime, entry.mtime))
                manifest.add(entry.name, "file", entry.mode, hashlib.sha256(data).hexdigest())
    return manifest.hash
