"""Weights through a file in memory that trainer and generators on one host map: one copy in all.

    [ magic, sizes, number of the newest slot | manifest ][ slot header | buffer ] x NUM_SLOTS

The trainer's snapshot goes straight into a slot; a reader looks at the slot where it lies. A slot's header has the
version twice: it is being written while the two differ, and was overwritten when they are not what they were.
"""

import contextlib
import json
import mmap
import os
import shutil
import struct
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rl.weights import NUM_SLOTS, Header, Manifest, Pulled, TornRead, WeightsMissing, WeightStoreHandle, pack

_FILE = struct.Struct("<8sQQq")
"""Magic, bytes of the manifest, bytes of a buffer, number of the newest slot (-1: none)."""
_MAGIC = b"weights1"
_SLOT = struct.Struct("<qqQ")
"""Version when the writing began and when it ended (-1: never), bytes of the header behind it."""
_PAGE = 4096
_HEADER_ROOM = 16 * _PAGE
_PREFIX = "orchestrate-weights"


def create() -> WeightStoreHandle:
    """A store of its own, owned by this process; what dead owners left is removed."""
    folder = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    numbered = _number_space()
    for left in folder.glob(f"{_PREFIX}-{os.getuid()}-*-{numbered}-*") if numbered else ():
        if not Path("/proc", left.name.split("-")[3]).exists():
            left.unlink(missing_ok=True)
    name = f"{_PREFIX}-{os.getuid()}-{os.getpid()}-{numbered}-{uuid.uuid4().hex[:12]}"
    return WeightStoreHandle(transport="shared_memory", place=str(folder / name))


def remove(handle: WeightStoreHandle) -> None:
    """Remove the store; ends that are open go on reading what they have."""
    Path(handle.place).unlink(missing_ok=True)


def _number_space() -> int:
    """What numbers of processes mean something here: containers may share the folder, but not these. 0: not known."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


class _Mapped:
    """The mapped file."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self.inode = os.fstat(file.fileno()).st_ino
            self.memory = mmap.mmap(file.fileno(), 0)
        magic, manifest_bytes, self.buffer_bytes, _ = _FILE.unpack_from(self.memory)
        if magic != _MAGIC:
            raise ValueError(f"`{path}` holds no weights")
        text = self.memory[_FILE.size : _FILE.size + manifest_bytes]
        self.manifest = Manifest.model_validate_json(text)
        self.slots = [
            _Slot(self.memory, _first_slot(manifest_bytes) + number * (_HEADER_ROOM + self.buffer_bytes), self.manifest)
            for number in range(NUM_SLOTS)
        ]

    @property
    def newest(self) -> int:
        """Number of the newest slot, -1 where nothing was pushed."""
        number: int = _FILE.unpack_from(self.memory)[3]
        return number

    def point_at(self, number: int) -> None:
        """Make a slot the newest one."""
        struct.pack_into("<q", self.memory, _FILE.size - 8, number)

    def close(self) -> None:
        """Unmap, unless tensors in it are still in use somewhere: then they keep it."""
        self.slots = []
        with contextlib.suppress(BufferError):
            self.memory.close()


class _Slot:
    """One version's place."""

    def __init__(self, memory: mmap.mmap, start: int, manifest: Manifest) -> None:
        self._memory = memory
        self._start = start
        buffer = torch.frombuffer(memory, dtype=torch.uint8, count=manifest.num_bytes, offset=start + _HEADER_ROOM)
        # Once for all versions: for a small model, making them takes longer than copying its weights.
        self.tensors = manifest.views(buffer)

    def write(self, header: Header, state: Mapping[str, Tensor]) -> None:
        text = header.model_dump_json().encode()
        if len(text) > _HEADER_ROOM - _SLOT.size:
            raise ValueError(f"the header of version {header.version} has {len(text)} bytes, at most {_HEADER_ROOM}")
        _SLOT.pack_into(self._memory, self._start, header.version, -1, len(text))
        self._memory[self._start + _SLOT.size : self._start + _SLOT.size + len(text)] = text
        pack(state, self.tensors)
        _SLOT.pack_into(self._memory, self._start, header.version, header.version, len(text))

    def versions(self) -> tuple[int, int]:
        """When the writing began and when it ended."""
        began, ended, _ = _SLOT.unpack_from(self._memory, self._start)
        return began, ended

    def header(self) -> Header:
        """What was written before the tensors. Raises `TornRead` while it is being written."""
        began, ended, size = _SLOT.unpack_from(self._memory, self._start)
        text = self._memory[self._start + _SLOT.size : self._start + _SLOT.size + size]
        if began != ended or self.versions() != (began, ended):
            raise TornRead(f"version {began} is being written")
        return Header.model_validate(json.loads(text))


class _PulledSlot(Pulled):
    def __init__(self, slot: _Slot, header: Header, num_bytes: int) -> None:
        super().__init__(header, slot.tensors, num_bytes)
        self._slot = slot

    def check(self) -> None:
        if self._slot.versions() != (self.header.version, self.header.version):
            raise TornRead(f"version {self.header.version} was overwritten by {self._slot.versions()[0]}")


class Writer:
    """The trainer's end. One that comes after a dead one goes on in its file."""

    def __init__(self, handle: WeightStoreHandle, manifest: Manifest) -> None:
        path = Path(handle.place)
        mapped = _Mapped(path) if path.exists() else None
        if mapped is None or mapped.manifest != manifest:
            _make(path, manifest)
            mapped = _Mapped(path)
        self._mapped = mapped
        self._written = mapped.newest

    def snapshot(self, header: Header, state: Mapping[str, Tensor]) -> None:
        """Into the oldest slot; the trainer waits for one copy of the bytes."""
        number = (self._mapped.newest + 1) % NUM_SLOTS
        self._mapped.slots[number].write(header, state)
        self._written = number

    async def push(self) -> int:
        """Only the number of the newest slot changes."""
        self._mapped.point_at(self._written)
        return self._mapped.manifest.num_bytes

    def close(self) -> None:
        """Unmap."""
        self._mapped.close()


class Reader:
    """A generator's end."""

    def __init__(self, handle: WeightStoreHandle) -> None:
        self._path = Path(handle.place)
        self._mapped: _Mapped | None = None

    async def pull(self, version: int) -> Pulled:
        """Where the newest version lies in the mapped file; nothing is copied."""
        mapped = self._open()
        newest = -1 if mapped is None else mapped.newest
        if mapped is None or newest < 0:
            raise WeightsMissing(f"`{self._path}` holds no weights yet, wanted version {version}")
        header = mapped.slots[newest].header()
        if header.version < version:
            raise WeightsMissing(f"`{self._path}` has version {header.version}, wanted {version} or newer")
        return _PulledSlot(mapped.slots[newest], header, mapped.manifest.num_bytes)

    def close(self) -> None:
        """Unmap."""
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None

    def _open(self) -> _Mapped | None:
        """The file that is there now; a trainer of another model may have replaced it."""
        try:
            inode = self._path.stat().st_ino
        except FileNotFoundError:
            return None
        if self._mapped is None or self._mapped.inode != inode:
            self.close()
            self._mapped = _Mapped(self._path)
        return self._mapped


def _make(path: Path, manifest: Manifest) -> None:
    text = manifest.model_dump_json().encode()
    start = _first_slot(len(text))
    temporary = path.with_name(f"{path.name}.partial")
    with open(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), "r+b") as file:  # noqa: PTH123 - mode 0600
        size = start + NUM_SLOTS * (_HEADER_ROOM + manifest.num_bytes)
        try:
            # Room that is only promised would be missed in the middle of a copy, which ends the process.
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(
                error.errno,
                f"the weights want {size >> 20} MB in `{path.parent}`, which has "
                f"{shutil.disk_usage(path.parent).free >> 20} MB: {error.strerror}\n\n"
                "hint: more shared memory for the container (`--shm-size`, `--ipc host`), or `transport: file`",
            ) from None
        file.write(_FILE.pack(_MAGIC, len(text), manifest.num_bytes, -1) + text)
        for number in range(NUM_SLOTS):
            file.seek(start + number * (_HEADER_ROOM + manifest.num_bytes))
            file.write(_SLOT.pack(-1, -1, 0))
    temporary.replace(path)


def _first_slot(manifest_bytes: int) -> int:
    return -(-(_FILE.size + manifest_bytes) // _PAGE) * _PAGE
