"""Weights through safetensors files in a folder that trainer and generators share: one file per version, by rename.

A file is never changed, so a read is never torn; the oldest ones are removed, and a reader that has one open keeps it.
Newer ones are removed too: they are of a trainer that was lost, and whose successor goes on from an older version.
"""

import asyncio
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rl.weights import NUM_SLOTS, Header, Manifest, Pulled, WeightsMissing, WeightStoreHandle

_SUFFIX = ".safetensors"


def create(folder: str = "") -> WeightStoreHandle:
    """A store in `folder`, by default in a temporary one."""
    return WeightStoreHandle(transport="file", place=folder or tempfile.mkdtemp(prefix="orchestrate-weights-"))


def remove(handle: WeightStoreHandle) -> None:
    """Remove the folder with all it holds."""
    shutil.rmtree(handle.place, ignore_errors=True)


class Writer:
    """The trainer's end."""

    def __init__(self, handle: WeightStoreHandle, manifest: Manifest) -> None:
        self._folder = Path(handle.place)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._manifest = manifest
        self._buffer = torch.empty(manifest.num_bytes, dtype=torch.uint8)
        self._header: Header | None = None

    def snapshot(self, header: Header, state: Mapping[str, Tensor]) -> None:
        """Into this process's own buffer."""
        self._manifest.pack(state, self._buffer)
        self._header = header

    async def push(self) -> int:
        """Write the file."""
        await asyncio.to_thread(self._write)
        return self._manifest.num_bytes

    def close(self) -> None:
        """The files stay."""

    def _write(self) -> None:
        from safetensors.torch import save_file

        assert self._header is not None
        path = self._folder / f"{self._header.version:012d}{_SUFFIX}"
        for abandoned in _versions(self._folder):
            if int(abandoned.stem) > self._header.version:
                abandoned.unlink(missing_ok=True)
        temporary = path.with_suffix(".partial")
        save_file(self._manifest.views(self._buffer), temporary, {"header": self._header.model_dump_json()})
        temporary.replace(path)
        for old in _versions(self._folder)[:-NUM_SLOTS]:
            old.unlink(missing_ok=True)


class Reader:
    """A generator's end."""

    def __init__(self, handle: WeightStoreHandle) -> None:
        self._folder = Path(handle.place)

    async def pull(self, version: int) -> Pulled:
        """Read the newest file."""
        return await asyncio.to_thread(self._read, version)

    def close(self) -> None:
        """Nothing is open between pulls."""

    def _read(self, version: int) -> Pulled:
        from safetensors import safe_open

        while True:
            found = _versions(self._folder)
            if not found or int(found[-1].stem) < version:
                has = f"version {int(found[-1].stem)}" if found else "no weights yet"
                raise WeightsMissing(f"`{self._folder}` has {has}, wanted {version} or newer")
            try:
                with safe_open(found[-1], "pt") as file:
                    header = Header.model_validate_json(file.metadata()["header"])
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            except FileNotFoundError:
                # Overtaken between the listing and the opening, each time by another version.
                continue
            return Pulled(header, tensors, sum(tensor.nbytes for tensor in tensors.values()))


def _versions(folder: Path) -> list[Path]:
    """Files, oldest version first."""
    return sorted(folder.glob(f"*{_SUFFIX}"))
