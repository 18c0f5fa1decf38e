"""A plan's folder as one file to send to a node that does not share it.

    walk, without what is ignored -> names, sizes, times -> (unchanged: the file made before) -> tar and content hash

Ignored is what `.orchestrateignore` names, in the syntax of `.gitignore`; without such a file, what `.gitignore` names.
Git's own folder, byte code, virtual environments and the run's logs never go along. What the step declares as an input
goes along in any case.
"""

import hashlib
import io
import os
import stat
import tarfile
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from pathspec import GitIgnoreSpec
from pydantic import ByteSize, TypeAdapter, ValidationError

from cluster.manifest import Manifest
from steps import StepError, StepRequest
from steps._file_patterns import matching

IGNORE_FILES = (".orchestrateignore", ".gitignore")
LIMIT_VARIABLE = "ORCHESTRATE_LARGEST_FOLDER"
"""Bytes, or a text like `1GiB`: the most that is sent of one folder."""

_ALWAYS_IGNORED = (".git/", "__pycache__/", "*.pyc", "node_modules/", ".mypy_cache/", ".ruff_cache/", ".pytest_cache/")
_VIRTUAL_ENVIRONMENT = "pyvenv.cfg"
"""Marks a folder that works at its own path only."""
_KEPT_PACKAGES = 4
_DEFAULT_LIMIT = "256MiB"
_MOST_FILES = 20_000
_SETTLED_S = 2.0
"""A file changed this recently may change again within one tick of its clock."""


class PackageError(Exception):
    """The folder cannot be sent: too large, or not readable."""


class Package:
    """A folder's content: a tar archive in a file without a name, which goes with this object."""

    def __init__(self, content_hash: str, descriptor: int) -> None:
        self.hash = content_hash
        """Hash of the content."""
        self.size = os.fstat(descriptor).st_size
        """Bytes of the archive."""
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    def read(self, offset: int, length: int) -> bytes:
        """A piece of the archive."""
        return os.pread(self._descriptor, length, offset)


class Packer:
    """Packs folders; keeps the last archives while nothing has changed. For use in one thread at a time."""

    def __init__(self) -> None:
        self._packed: dict[tuple[str, tuple[str, ...]], tuple[str, Package]] = {}

    def pack(self, request: StepRequest) -> Package:
        """The plan's folder of a request. Raises `PackageError`."""
        folder = Path(request.plan_dir)
        try:
            files = sorted(_files(folder, request))
            statuses = {name: path.lstat() for name, path in files}
            _check_size(folder, statuses)
            stamp = hashlib.sha256(repr([(name, _stamp(status)) for name, status in statuses.items()]).encode())
            known = self._packed.get((request.plan_dir, request.inputs))
            if known is not None and known[0] == stamp.hexdigest():
                return known[1]
            package = _write(folder, files)
        except (OSError, StepError) as error:
            raise PackageError(f"the plan's folder `{folder}` cannot be read: {error}") from error
        newest = max((status.st_mtime for status in statuses.values()), default=0.0)
        if time.time() - newest > _SETTLED_S:
            self._packed.pop((request.plan_dir, request.inputs), None)
            self._packed[request.plan_dir, request.inputs] = stamp.hexdigest(), package
            for oldest in list(self._packed)[:-_KEPT_PACKAGES]:
                del self._packed[oldest]
        return package


def _files(folder: Path, request: StepRequest) -> Iterator[tuple[str, Path]]:
    """Name in the folder and path of everything that is sent, folders included; each once."""
    lines = [*_ALWAYS_IGNORED, *_ignore_lines(folder)]
    log_dir = Path(request.log_dir)
    if log_dir != folder and log_dir.is_relative_to(folder):
        lines.append(f"/{log_dir.relative_to(folder)}/")
    found = dict(_walk(folder, "", GitIgnoreSpec.from_lines(lines), set()))
    for pattern in request.inputs:
        for name, path in matching(folder, pattern):
            if not Path(name).is_absolute():
                found[name] = path
                found.update((str(parent), folder / parent) for parent in list(Path(name).parents)[:-1])
    return iter(found.items())


def _ignore_lines(folder: Path) -> list[str]:
    for name in IGNORE_FILES:
        if (folder / name).is_file():
            return (folder / name).read_text(errors="replace").splitlines()
    return []


def _walk(
    folder: Path, prefix: str, ignored: GitIgnoreSpec, entered: set[tuple[int, int]]
) -> Iterator[tuple[str, Path]]:
    """Entries below a folder. A link that leads out of the plan's folder counts as what it leads to."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in entered:
        return
    entered.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        for entry in entries:
            name, path = f"{prefix}{entry.name}", Path(entry.path)
            is_folder = entry.is_dir()
            if ignored.match_file(f"{name}/" if is_folder else name):
                continue
            if is_folder and (path / _VIRTUAL_ENVIRONMENT).exists():
                continue
            if is_folder and not entry.is_symlink():
                yield name, path
                yield from _walk(path, f"{name}/", ignored, entered)
            elif entry.is_file() or entry.is_symlink():
                yield name, path


def _check_size(folder: Path, statuses: dict[str, os.stat_result]) -> None:
    text = os.environ.get(LIMIT_VARIABLE, _DEFAULT_LIMIT)
    try:
        limit = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        raise PackageError(f"{LIMIT_VARIABLE} is `{text}`, wanted bytes or a text like `1GiB`") from None
    sizes = {name: status.st_size for name, status in statuses.items() if stat.S_ISREG(status.st_mode)}
    total = sum(sizes.values())
    if total <= limit and len(statuses) <= _MOST_FILES:
        return
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:3]
    most = ", ".join(f"`{name}` ({size / 1e6:,.1f} MB)" for name, size in largest)
    raise PackageError(
        f"the plan's folder `{folder}` is too large for a node that does not share it: {total / 1e6:,.1f} MB in "
        f"{len(statuses):,} files, wanted at most {limit / 1e6:,.1f} MB in {_MOST_FILES:,}; the largest are {most}\n\n"
        f"hint: name what steps do not need in `.orchestrateignore`, or set {LIMIT_VARIABLE} for the worker"
    )


def _write(folder: Path, files: Iterable[tuple[str, Path]]) -> Package:
    with tempfile.TemporaryFile() as target:
        content_hash = _write_archive(folder, files, target)
        target.flush()
        return Package(content_hash, os.dup(target.fileno()))


def _write_archive(folder: Path, files: Iterable[tuple[str, Path]], target: IO[bytes]) -> str:
    manifest, root = Manifest(), folder.resolve()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, path in files:
            entry = tarfile.TarInfo(name)
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                resolved = path.resolve()
                if resolved.is_relative_to(root):
                    entry.type, entry.linkname = tarfile.SYMTYPE, os.path.relpath(resolved, path.parent.resolve())
                    manifest.add(name, "link", content=entry.linkname)
                    archive.addfile(entry)
                    continue
                if not path.is_file():
                    raise PackageError(
                        f"`{name}` in the plan's folder `{folder}` leads out of it, to `{resolved}`\n\n"
                        "hint: name it in `.orchestrateignore`"
                    )
                status = path.stat()
            entry.mode, entry.mtime = stat.S_IMODE(status.st_mode), status.st_mtime
            if stat.S_ISDIR(status.st_mode):
                entry.type = tarfile.DIRTYPE
                manifest.add(name, "folder")
                archive.addfile(entry)
            else:
                data = path.read_bytes()
                entry.size = len(data)
                manifest.add(name, "file", entry.mode, hashlib.sha256(data).hexdigest())
                archive.addfile(entry, io.BytesIO(data))
    return manifest.hash


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
