"""The modules of a plan's own folder that a Python file imports, found in its text: nothing is run."""

import ast
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
                waiting.extend(_module_files(folder, module))
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


def _module_files(folder: Path, module: str) -> Iterator[Path]:
    """The module's file and the `__init__.py` of every package it is in."""
    parts = [part for part in module.split(".") if part]
    for depth in range(1, len(parts) + 1):
        path = folder.joinpath(*parts[:depth])
        yield from (file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file())
