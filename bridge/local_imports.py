"""The modules of a plan's own folder that a Python file imports, found in its text: nothing is run."""

import ast
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

MAX_MODULES = 500


def with_local_imports(files: list[Path], folder: Path) -> list[Path]:
    """`files` and every module below `folder` that they import, directly or through each other.

    Imports made at run time by name are not seen. At most 500 modules are followed.
    """
    found: dict[Path, None] = {}
    waiting = list(files)
    while waiting and len(found) < MAX_MODULES:
        path = waiting.pop()
        if path in found:
            continue
        found[path] = None
        if path.suffix == ".py" and path.is_relative_to(folder):
            status = path.stat()
            for module in _imports(path, folder, status.st_mtime_ns, status.st_size):
                # A module is found from the plan's folder, a script's own folder comes first on its path.
                for root in {folder, path.parent}:
                    waiting.extend(_module_files(str(root), module))
    return sorted(found)


@lru_cache(maxsize=1024)
def _imports(path: Path, folder: Path, mtime_ns: int, size: int) -> tuple[str, ...]:
    """Dotted names relative to `folder`; the stamp tells a changed file from the one that was read before."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ()
    package = path.parent.relative_to(folder).parts
    return tuple(sorted(set(_names(tree, package))))


def _names(tree: ast.Module, package: tuple[str, ...]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}".lstrip(".") for alias in node.names)


def _module_files(root: str, module: str) -> Iterator[Path]:
    """The module's file and the `__init__.py` of every package it is in. Plain strings: most imports are not local."""
    path = root
    for part in filter(None, module.split(".")):
        path = f"{path}/{part}"
        if os.path.isfile(f"{path}.py"):  # noqa: PTH113
            yield Path(f"{path}.py")
        if not os.path.isdir(path):  # noqa: PTH112
            return
        if os.path.isfile(f"{path}/__init__.py"):  # noqa: PTH113
            yield Path(f"{path}/__init__.py")
