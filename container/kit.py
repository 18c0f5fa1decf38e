"""The kit: our packages and what they need, in one folder that containers of Ray actors see read-only.

    <this installation> -> <tmp>/orchestrate-kits-<uid>/<hash>/{cluster,container,steps,pydantic,...}

The hash is over our files and the versions of the rest, so a kit never changes once it is there. Compiled packages in
it fit the Python minor version they were installed for; Ray wants the same one on both sides anyway.
"""

import compileall
import hashlib
import os
import py_compile
import re
import shutil
import sys
import tempfile
import time
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from container.worker import KIT

PACKAGES = ("cluster", "container", "steps")
NEEDS_AT_START = ("pydantic", "psutil")
"""Distributions that every actor imports, without those they need in turn; in the kit they are compiled."""
NEEDS = (*NEEDS_AT_START, "httpx", "huggingface-hub")
"""Those that steps use in a container."""
_UNUSED_S = 30 * 86_400.0


def ensure_kit(root: Path) -> Path:
    """The kit of this installation under `root`; made when it is not there."""
    kit = root / _identity()
    if kit.is_dir():
        os.utime(kit)
        return kit
    _sweep(root)
    making = Path(tempfile.mkdtemp(dir=root, prefix=".making-"))
    try:
        own = Path(__file__).parent.parent
        for package in PACKAGES:
            for path in _sources(own / package):
                goal = making / path.relative_to(own)
                goal.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, goal)
        at_start = _closure(NEEDS_AT_START)
        for name in at_start:
            _copy_distribution(metadata.distribution(name), making)
        # Nobody can write beside them in a container, and a kit's files never change.
        unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
        compileall.compile_dir(making, quiet=2, stripdir=making, prependdir=KIT, invalidation_mode=unchecked)
        for name in set(_closure(NEEDS)) - set(at_start):
            _copy_distribution(metadata.distribution(name), making)
        making.chmod(0o755)
        making.rename(kit)
    except OSError:
        # Another process was faster.
        if not kit.is_dir():
            raise
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return kit


def kits_root() -> Path:
    """Where the kits of this user lie on this machine."""
    root = Path(tempfile.gettempdir()) / f"orchestrate-kits-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.stat().st_uid != os.getuid() or root.is_symlink():
        raise PermissionError(f"`{root}` belongs to somebody else\n\nhint: remove it, or set TMPDIR for the Ray node")
    return root


@lru_cache(maxsize=1)
def _identity() -> str:
    digest = hashlib.sha256(f"{sys.version_info[:2]}".encode())
    own = Path(__file__).parent.parent
    for package in PACKAGES:
        for path in _sources(own / package):
            digest.update(f"{path.relative_to(own)}\0".encode() + path.read_bytes())
    for name in _closure(NEEDS):
        digest.update(f"{name} {metadata.version(name)}\n".encode())
    return digest.hexdigest()[:16]


def _sources(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


@lru_cache(maxsize=2)
def _closure(names: tuple[str, ...]) -> tuple[str, ...]:
    """These distributions and all they require, extras aside, as far as it is installed."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        for text in required:
            if "extra ==" not in text and (match := re.match(r"[A-Za-z0-9._-]+", text)):
                waiting.append(re.sub(r"[-_.]+", "-", match[0]).lower())
    return tuple(sorted(found))


def _copy_distribution(distribution: metadata.Distribution, goal: Path) -> None:
    for file in distribution.files or []:
        # Programs lie outside of the import path; so do, in a wheel, headers and data.
        if ".." in file.parts or "__pycache__" in file.parts:
            continue
        source, target = Path(str(file.locate())), goal / file
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def _sweep(root: Path) -> None:
    """Remove kits that nobody has asked for in a month, and what a killed process left half made."""
    for folder in root.iterdir():
        age_s = time.time() - folder.stat().st_mtime
        if age_s > _UNUSED_S or (folder.name.startswith(".making-") and age_s > 3600):
            shutil.rmtree(folder, ignore_errors=True)
