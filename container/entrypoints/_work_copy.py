"""Copies an environment to where a store keeps its own; runs in Spack's Python: SOURCE GOAL STORE.

Adapted are: paths of the standard store, which become those of STORE; a store and a view where the environment names
none; repositories beside it, which get whole paths; and the repository of Spack's packages, which becomes the checkout
that is here, if there is one, so that nothing is cloned.
"""

import io
import os
import sys
from pathlib import Path
from typing import Any

import spack.util.spack_yaml as spack_yaml

STANDARD_STORE = "/opt/spack_store"
PACKAGES = Path(os.environ.get("SYGALDRY_SPACK_PACKAGES") or "/opt/spack_packages")


def main(source: Path, goal: Path, store: str) -> None:
    """Make or update the copy."""
    goal.mkdir(parents=True, exist_ok=True)
    document = spack_yaml.load_config((source / "spack.yaml").read_text().replace(STANDARD_STORE, store))
    adapt(document["spack"], source, store)
    stream = io.StringIO()
    spack_yaml.dump_config(document, stream)
    write(goal / "spack.yaml", stream.getvalue())
    lock = source / "spack.lock"
    if lock.is_file():
        write(goal / "spack.lock", lock.read_text())
    else:
        (goal / "spack.lock").unlink(missing_ok=True)


def adapt(section: Any, source: Path, store: str) -> None:
    """Change a manifest's section `spack` in place."""
    if section.get("view", True) is True:
        section["view"] = {source.name: {"root": f"{store}/views/{source.name}"}}
    config = section.setdefault("config", {})
    config.setdefault("install_tree", {"root": store})
    for folder in ("build_stage", "source_cache", "misc_cache"):
        config.setdefault(folder, f"{store}/{folder}")
    repos = section.get("repos") or {}
    for name, place in repos.items():
        if isinstance(place, str) and not place.startswith(("/", "~", "$")):
            repos[name] = str(source / place)
    builtin = PACKAGES / "repos" / "spack_repo" / "builtin"
    if builtin.is_dir() and "builtin" in repos:
        repos["builtin"] = str(builtin)


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
