"""The work of `demo.yaml`: index the Python packages of a folder.

    list_packages -> shard_packages -> count_shard (one per shard) -> merge_counts -> draw_chart

Every function takes JSON values, writes its bulk to files and returns small outputs, so each can run on another machine
that sees the same folder.
"""

import ast
import csv
import heapq
import json
import os
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import demo_chart

from steps import Context

KINDS = ("code", "docstrings", "comments")
Symbol = tuple[str, str, str, int]
"""Name, kind (`class` or `function`), file relative to the root, line from 1."""


def list_packages(root: str, output: str) -> dict[str, Any]:
    """Find the packages below `root` (empty: this interpreter's own site-packages) and their source files."""
    folder = Path(root or sysconfig.get_path("purelib")).resolve()
    packages = {
        entry.stem: files
        for entry in sorted(folder.iterdir())
        if not entry.name.startswith((".", "_")) and (files := _source_files(entry, folder))
    }
    if not packages:
        raise ValueError(f"no Python source in `{folder}`\n\nhint: give a folder of packages with `-p root=FOLDER`")
    manifest = _write_json(Path(output) / "packages.json", {"root": str(folder), "packages": packages})
    return {"manifest": str(manifest), "packages": len(packages), "files": sum(map(len, packages.values()))}


def shard_packages(manifest: str, shards: int, output: str) -> dict[str, Any]:
    """Split the files into at most `shards` parts of about the same number of bytes."""
    listed = _read_json(manifest)
    sizes = [(size, package, file) for package, files in listed["packages"].items() for file, size in files.items()]
    parts: list[dict[str, list[str]]] = [{} for _ in range(min(shards, len(sizes)))]
    lightest = [(0, number) for number in range(len(parts))]
    for size, package, file in sorted(sizes, reverse=True):
        total, number = heapq.heappop(lightest)
        parts[number].setdefault(package, []).append(file)
        heapq.heappush(lightest, (total + size, number))
    paths = [
        _write_json(Path(output) / "shards" / f"{number}.json", {"root": listed["root"], "packages": part})
        for number, part in enumerate(parts)
    ]
    return {"shards": [str(path) for path in paths]}


def count_shard(shard: str, context: Context | None = None) -> dict[str, Any]:
    """Count the lines and find the symbols of one shard; the results lie beside it."""
    part = _read_json(shard)
    counts: dict[str, Counter[str]] = {}
    symbols: list[Symbol] = []
    for done, (package, files) in enumerate(part["packages"].items()):
        if context:
            context.check_cancelled()
            context.heartbeat({"text": package, "fraction": done / len(part["packages"])})
        counts[package] = Counter()
        for file in files:
            text = (Path(part["root"]) / file).read_text(encoding="utf-8", errors="replace")
            lines, found = count_source(text)
            counts[package].update(lines, files=1)
            symbols += [(name, kind, file, line) for name, kind, line in found]
    result = _write_json(Path(shard).with_suffix(".counts.json"), {"counts": counts, "symbols": symbols})
    return {"result": str(result), "lines": sum(_lines(count) for count in counts.values())}


def merge_counts(results: list[str], root: str, output: str) -> dict[str, Any]:
    """Add the shards up: one row per package in `packages.csv`, every symbol in `tags` (the format of ctags)."""
    counts: dict[str, Counter[str]] = {}
    symbols: list[Symbol] = []
    for result in results:
        part = _read_json(result)
        symbols += map(tuple, part["symbols"])
        for package, count in part["counts"].items():
            counts.setdefault(package, Counter()).update(count)
    largest = sorted(counts, key=lambda package: (-_lines(counts[package]), package))
    columns = ("files", *KINDS, "blank", "unparsed")
    table = _replace(Path(output) / "packages.csv")
    with table.open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(("package", *columns))
        rows.writerows((package, *(counts[package][column] for column in columns)) for package in largest)
    tags = _write_tags(Path(output) / "tags", symbols, Path(root or sysconfig.get_path("purelib")).resolve())
    return {
        "table": str(table.rename(Path(output).resolve() / "packages.csv")),
        "tags": str(tags),
        "lines": sum(map(_lines, counts.values())),
        "symbols": len(symbols),
        "largest": largest[0],
    }


def draw_chart(table: str, top: int, output: str) -> dict[str, Any]:
    """Draw the `top` largest packages as a PNG."""
    with Path(table).open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    bars = [(row["package"], [int(row[kind]) for kind in KINDS]) for row in rows]
    total = sum(sum(values) for _, values in bars)
    title = f"{total:,} lines of Python in {len(bars)} packages"
    image = demo_chart.draw_bars(bars[:top], KINDS, title, f"the {len(bars[:top])} largest, without blank lines")
    path = Path(output).resolve() / "packages.png"
    image.save(_replace(path), format="PNG")
    _replace(path).rename(path)
    return {"found": title, "table": table, "picture": str(path)}


def count_source(text: str) -> tuple[Counter[str], list[tuple[str, str, int]]]:
    """Line counts by kind, and (name, kind, line) of the classes and functions, of one source text.

    A line that starts with `#` inside a string counts as a comment. What cannot be parsed has counts but no symbols.
    """
    lines = text.splitlines()
    kinds = ["blank" if not line.strip() else "comments" if line.lstrip()[0] == "#" else "code" for line in lines]
    symbols: list[tuple[str, str, int]] = []
    unparsed = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        unparsed = 1
    else:
        for node in _definitions(tree):
            if not isinstance(node, ast.Module):
                symbols.append((node.name, "class" if isinstance(node, ast.ClassDef) else "function", node.lineno))
            if doc := _docstring(node):
                for number in range(doc.lineno - 1, min(doc.end_lineno or doc.lineno, len(kinds))):
                    kinds[number] = "docstrings" if kinds[number] != "blank" else "blank"
    return Counter(kinds) + Counter(unparsed=unparsed), symbols


Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(tree: ast.Module) -> Iterator[Definition]:
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Definition):
            yield node
        # Expressions hold no definitions but are most of a tree.
        waiting += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]


def _docstring(node: Definition) -> ast.Expr | None:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return first
    return None


def _source_files(entry: Path, root: Path) -> dict[str, int]:
    found = [entry] if entry.is_file() and entry.suffix == ".py" else []
    if entry.is_dir() and not entry.is_symlink() and entry.suffix == "":
        found = [Path(folder) / name for folder, _, names in os.walk(entry) for name in names if name.endswith(".py")]
    return {path.relative_to(root).as_posix(): path.stat().st_size for path in sorted(found) if path.is_file()}


def _lines(count: Counter[str] | dict[str, int]) -> int:
    return sum(count.get(kind, 0) for kind in KINDS)


def _write_tags(path: Path, symbols: Iterable[Symbol], root: Path) -> Path:
    tags = sorted(f'{name}\t{root / file}\t{line};"\t{kind[0]}' for name, kind, file, line in symbols)
    header = ["!_TAG_FILE_FORMAT\t2\t//", "!_TAG_FILE_SORTED\t1\t//"]
    _replace(path).write_text("\n".join([*header, *tags, ""]), encoding="utf-8")
    return _replace(path).rename(path.resolve())


def _replace(path: Path) -> Path:
    """The temporary name beside `path`; renamed when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.part")


def _write_json(path: Path, value: Any) -> Path:
    _replace(path).write_text(json.dumps(value), encoding="utf-8")
    return _replace(path).rename(path.resolve())


def _read_json(path: str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))
