"""Spack environments by name: a folder with `spack.yaml` and `spack.lock`, and what the two say.

    spack/<name>, or a folder of the user's -> find -> Environment -> lock_hash -> identity of images, cache keys

Reads files only; what runs Spack is in `spack_commands`.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

MANIFEST, LOCK = "spack.yaml", "spack.lock"
BUILT = "built.lock"
"""In a store, the lock from which the environment was last built to the end."""
FOLDERS_VARIABLE = "SYGALDRY_SPACK_ENVIRONMENTS"
"""Environment variable with folders of environments, separated by `:`; they are searched before ours."""
MANIFEST_HASH = "manifest-sha256"
"""Key in the `_meta` of a lock of ours: what the manifest was when the lock was made."""
_OURS = Path(__file__).parent.parent / "spack"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NAME_AND_VERSION = re.compile(r"\s*([\w.-]+)(@[\w.:=,-]+)?")
_NOT_SOLVED = ("view", "config")
"""Sections of a manifest that do not change what is concretized."""


class EnvironmentProblem(Exception):
    """There is no such environment, or its files cannot be used."""


@dataclass(frozen=True)
class Environment:
    """One environment, its files read when they are first asked for."""

    folder: Path
    called: str = field(default="", compare=False)
    """How a person named it; the name by default."""

    @property
    def name(self) -> str:
        """Name of the environment, which is its folder's."""
        return self.folder.name

    @property
    def manifest_file(self) -> Path:
        """What is wanted, for people to edit."""
        return self.folder / MANIFEST

    @property
    def lock_file(self) -> Path:
        """What Spack made of it; may not exist yet."""
        return self.folder / LOCK

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The section `spack` of the manifest."""
        try:
            document = yaml.safe_load(self.manifest_file.read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise EnvironmentProblem(f"`{self.manifest_file}` cannot be read: {error}") from error
        if not isinstance(document, dict) or not isinstance(document.get("spack"), dict):
            raise EnvironmentProblem(f"`{self.manifest_file}` has no section `spack`")
        section: dict[str, Any] = document["spack"]
        if not all(isinstance(spec, str) for spec in section.get("specs") or []):
            raise EnvironmentProblem(
                f"`specs` of `{self.manifest_file}` has an entry that is no text\n\nhint: matrices are not supported"
            )
        return section

    @cached_property
    def lock(self) -> dict[str, Any] | None:
        """The lock file's content; None when there is none."""
        return _read_lock(self.lock_file)

    @property
    def specs(self) -> list[str]:
        """The specs a user wrote."""
        return list(self.manifest.get("specs") or [])

    @property
    def roots(self) -> dict[str, dict[str, Any]]:
        """What the lock says of each root, by hash. Raises `EnvironmentProblem` where there is no lock."""
        lock = self._locked()
        return {root["hash"]: lock["concrete_specs"][root["hash"]] for root in lock["roots"]}

    @property
    def uses_cuda(self) -> bool:
        """True when the lock has CUDA among its packages."""
        return any(spec["name"] == "cuda" for spec in self._locked()["concrete_specs"].values())

    @property
    def lock_hash(self) -> str:
        """64 hex digits of what is locked, however it is formatted. Raises `EnvironmentProblem` without a lock."""
        return _hash(self._locked())

    @property
    def manifest_hash(self) -> str:
        """64 hex digits of what concretizing depends on; comments, view and stores do not count."""
        solved = {name: value for name, value in self.manifest.items() if name not in _NOT_SOLVED}
        return hashlib.sha256(json.dumps(solved, sort_keys=True).encode()).hexdigest()

    @property
    def staleness(self) -> str:
        """Why the lock is not one of this manifest, in words; empty when it is."""
        lock = self._locked()
        wanted = {_comparable(spec): spec for spec in self.specs}
        locked = {_comparable(root["spec"]): root["spec"] for root in lock["roots"]}
        changes = [f"`{wanted[each]}` is not locked" for each in wanted.keys() - locked.keys()]
        changes += [f"`{locked[each]}` is locked but not wanted" for each in locked.keys() - wanted.keys()]
        if changes:
            return "; ".join(sorted(changes))
        made_of = lock.get("_meta", {}).get(MANIFEST_HASH, self.manifest_hash)
        return "" if made_of == self.manifest_hash else f"`{MANIFEST}` was changed after it was locked"

    def _locked(self) -> dict[str, Any]:
        if self.lock is None:
            raise EnvironmentProblem(
                f"environment `{self.name}` has no lock: there is no `{self.lock_file}`\n\n"
                f"hint: `orchestrate spack lock {self.called or self.name}` makes one"
            )
        return self.lock


def find(name_or_folder: str | Path, folders: Iterable[Path] = ()) -> Environment:
    """The environment of this name in `folders`, in those of `SYGALDRY_SPACK_ENVIRONMENTS` or among ours.

    A text with a slash, and a `Path`, is the folder itself. Raises `EnvironmentProblem`.
    """
    if isinstance(name_or_folder, Path) or "/" in name_or_folder or name_or_folder in (".", ".."):
        folder = Path(name_or_folder).absolute()
        folder = folder.parent if folder.name in (MANIFEST, LOCK) else folder
        if not (folder / MANIFEST).is_file():
            raise EnvironmentProblem(f"`{folder}` is not a Spack environment: it has no `{MANIFEST}`")
        return Environment(folder.resolve(), str(name_or_folder))
    for folder in _searched(folders):
        if (folder / name_or_folder / MANIFEST).is_file():
            return Environment(folder.absolute() / name_or_folder)
    known = [environment.name for environment in environments(folders)]
    raise EnvironmentProblem(
        f"there is no Spack environment `{name_or_folder}`\n\nhint: known environments: {', '.join(known) or 'none'}; "
        f"`orchestrate spack new {name_or_folder}` makes one"
    )


def environments(folders: Iterable[Path] = ()) -> list[Environment]:
    """Every environment that `find` finds by name, by name."""
    found: dict[str, Environment] = {}
    for folder in _searched(folders):
        for manifest in folder.glob(f"*/{MANIFEST}"):
            found.setdefault(manifest.parent.name, Environment(manifest.parent.absolute()))
    return [found[name] for name in sorted(found)]


def lock_hash(name_or_folder: str | Path) -> str:
    """`Environment.lock_hash` of the environment that `find` finds."""
    return find(name_or_folder).lock_hash


def check_built(environment: Environment, store: Path) -> None:
    """Raise `EnvironmentProblem` unless the store on this machine has the environment, whole and of the same lock."""
    hint = f"\n\nhint: `orchestrate spack build {environment.called or environment.name}`"
    lock = _read_lock(store / "environments" / environment.name / BUILT)
    if lock is None:
        raise EnvironmentProblem(f"environment `{environment.name}` is not built in the store `{store}`{hint}")
    if _hash(lock) != environment.lock_hash:
        raise EnvironmentProblem(
            f"environment `{environment.name}` in the store `{store}` was built from the lock `{_hash(lock)[:12]}`, "
            f"wanted `{environment.lock_hash[:12]}` of `{environment.lock_file}`{hint}"
        )


def is_name(text: str) -> bool:
    """True for what may be the name of an environment."""
    return _NAME.fullmatch(text) is not None


def _searched(folders: Iterable[Path]) -> Iterator[Path]:
    yield from folders
    yield from (Path(each) for each in os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep) if each)
    yield _OURS


def _read_lock(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(
            f"`{path}` cannot be read: {error}\n\nhint: `orchestrate spack lock {path.parent.name} --force`"
        ) from error
    if not isinstance(document, dict) or not {"roots", "concrete_specs"} <= document.keys():
        raise EnvironmentProblem(f"`{path}` is not a lock of Spack's: it has no `roots` or no `concrete_specs`")
    return document


def _hash(lock: dict[str, Any]) -> str:
    locked = {"roots": lock["roots"], "concrete_specs": lock["concrete_specs"]}
    return hashlib.sha256(json.dumps(locked, sort_keys=True).encode()).hexdigest()


def _comparable(spec: str) -> tuple[str, str]:
    """Name and version of a spec; how variants are spelled is Spack's affair."""
    found = _NAME_AND_VERSION.match(spec)
    return (found[1], found[2] or "") if found else (spec, "")
