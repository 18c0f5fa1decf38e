"""Strict YAML: text -> data and the place of every value. The first thing that happens to a plan file.

Aliases, anchors, tags, merge keys, duplicate keys, a second document and over-large or over-deep documents are refused;
plain scalars follow the YAML 1.2 core schema (`no` is a text, `0o14` is twelve, `12:30:00` and `2026-01-01` are texts).
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from bridge.problems import Finding, Path

try:
    from yaml import CSafeLoader as _Loader
except ImportError:
    from yaml import SafeLoader as _Loader  # type: ignore[assignment]

MAX_BYTES = 8 * 1024 * 1024
MAX_DEPTH = 50
MAX_NODES = 500_000
MAX_DIGITS = 4000
"""Longer digits stay text: Python refuses to turn them into a number."""

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+\Z")
_OCTAL_OR_HEX = re.compile(r"0o[0-7]+\Z|0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_SPECIAL_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z")
_STARTS_NUMBER = frozenset("+-.0123456789")


class Node:
    """Where a value stands, and how it was written."""

    __slots__ = ("column", "entries", "items", "key_places", "line", "text")

    def __init__(self, line: int, column: int, text: str | None = None) -> None:
        self.line = line
        self.column = column
        self.text = text
        """Source text of a scalar."""
        # A plan is mostly scalars, and they share what they do not have.
        self.entries: dict[str, Node] = {} if text is None else _NO_ENTRIES
        self.key_places: dict[str, tuple[int, int]] = {} if text is None else _NO_PLACES
        self.items: list[Node] = [] if text is None else _NO_ITEMS

    def child(self, part: str | int) -> "Node | None":
        """The node below, or None."""
        if isinstance(part, int):
            return self.items[part] if 0 <= part < len(self.items) else None
        return self.entries.get(part)

    def place(self, path: Path, at_key: bool = False) -> tuple[int, int]:
        """Line and column, from 1, of the value at `path`, or of what is nearest above it."""
        node = self
        for depth, part in enumerate(path):
            if at_key and depth == len(path) - 1 and part in node.key_places:
                line, column = node.key_places[str(part)]
                return line + 1, column + 1
            below = node.child(part)
            if below is None:
                break
            node = below
        return node.line + 1, node.column + 1


@dataclass
class Document:
    """A YAML text as data, with the place of every value and what is wrong with the text itself."""

    data: Any = None
    root: Node = field(default_factory=lambda: Node(0, 0))
    findings: list[tuple[Finding, int, int]] = field(default_factory=list)
    """Each with its own line and column, from 1: a duplicate key has no path of its own."""
    complete: bool = True
    """False when reading stopped or a value is unknown, so that `data` says nothing."""


_NO_ENTRIES: dict[str, Node] = {}
_NO_PLACES: dict[str, tuple[int, int]] = {}
_NO_ITEMS: list[Node] = []


class _Stop(Exception):
    """Reading cannot go on."""


class _Builder:
    """Turns parser events into data, one at a time, without recursion."""

    def __init__(self) -> None:
        self.document = Document()
        self._stack: list[tuple[Any, Node]] = []
        self._keys: list[str | None] = []
        self._path: list[str | int] = []
        self._num_nodes = 0
        self._num_documents = 0

    def report(self, event: Any, message: str, hint: str = "") -> None:
        mark = event.start_mark
        finding = Finding(tuple(self._path), message, hint)
        self.document.findings.append((finding, mark.line + 1, mark.column + 1))

    def stop(self, event: Any, message: str, hint: str = "") -> None:
        self.report(event, message, hint)
        raise _Stop

    def feed(self, event: Any) -> None:
        kind = type(event)
        if kind is yaml.ScalarEvent:
            self._scalar(event)
        elif kind is yaml.MappingStartEvent or kind is yaml.SequenceStartEvent:
            self._open(event, {} if kind is yaml.MappingStartEvent else [])
        elif kind is yaml.MappingEndEvent or kind is yaml.SequenceEndEvent:
            self._stack.pop()
            self._keys.pop()
            if self._path:
                self._path.pop()
        elif kind is yaml.AliasEvent:
            self.report(event, f"alias `*{event.anchor}`: aliases are not allowed", "write the value out")
            self.document.complete = False
            self._add(event, None, Node(event.start_mark.line, event.start_mark.column))
        elif kind is yaml.DocumentStartEvent:
            self._num_documents += 1
            if self._num_documents > 1:
                self.stop(event, "a second document starts here, wanted one", "keep one plan in each file")

    def _open(self, event: Any, container: Any) -> None:
        if len(self._stack) >= MAX_DEPTH:
            self.stop(event, f"nested deeper than {MAX_DEPTH} levels")
        self._refuse_anchor_and_tag(event)
        if self._wants_key():
            self.stop(event, "got a list or a mapping as a key, wanted a text")
        node = Node(event.start_mark.line, event.start_mark.column)
        self._add(event, container, node)
        self._stack.append((container, node))
        self._keys.append(None)

    def _wants_key(self) -> bool:
        return bool(self._stack) and type(self._stack[-1][0]) is dict and self._keys[-1] is None

    def _scalar(self, event: Any) -> None:
        if event.anchor is not None or event.tag is not None:
            self._refuse_anchor_and_tag(event)
        mark = event.start_mark
        plain = not event.style
        if self._wants_key():
            self._key(event, plain)
            return
        value = core_value(event.value) if plain else event.value
        self._add(event, value, Node(mark.line, mark.column, event.value))

    def _key(self, event: Any, plain: bool) -> None:
        key, node = event.value, self._stack[-1][1]
        if plain and key == "<<":
            self.report(event, "merge key `<<`: merge keys are not allowed", "write the keys out")
        elif key in node.key_places:
            first_line = node.key_places[key][0] + 1
            self.report(event, f"duplicate key `{key}`, first on line {first_line}", "keep one of them")
        else:
            node.key_places[key] = (event.start_mark.line, event.start_mark.column)
        self._keys[-1] = key

    def _add(self, event: Any, value: Any, node: Node) -> None:
        self._num_nodes += 1
        if self._num_nodes > MAX_NODES:
            self.stop(event, f"more than {MAX_NODES:,} values in one plan", "split the plan")
        part: str | int | None = None
        if not self._stack:
            self.document.data, self.document.root = value, node
        else:
            container, parent = self._stack[-1]
            if type(container) is dict:
                part = self._keys[-1]
                self._keys[-1] = None
                if part in parent.key_places and part not in container:
                    container[part] = value
                    parent.entries[part] = node
            else:
                part = len(container)
                container.append(value)
                parent.items.append(node)
        if type(value) in (dict, list) and part is not None and type(event) is not yaml.AliasEvent:
            self._path.append(part)

    def _refuse_anchor_and_tag(self, event: Any) -> None:
        if event.anchor is not None:
            self.report(event, f"anchor `&{event.anchor}`: anchors are not allowed", "remove it")
        if event.tag is not None:
            self.report(
                event, f"tag `{event.tag}`: tags are not allowed", "remove it; quote the value to make it a text"
            )


def read_document(text: str) -> Document:
    """Read one YAML document. Never raises: what is wrong is in `findings`."""
    builder = _Builder()
    document = builder.document
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        message = f"the plan has more than {MAX_BYTES:,} bytes"
        document.findings.append((Finding((), message, "split the plan, or move data into files"), 1, 1))
        document.complete = False
        return document
    try:
        for event in yaml.parse(text, Loader=_Loader):
            builder.feed(event)
    except _Stop:
        document.complete = False
    except yaml.YAMLError as error:
        document.complete = False
        document.findings.append(_syntax_error(error, text))
    return document


def core_value(text: str) -> Any:
    """What a plain scalar means in the YAML 1.2 core schema."""
    if text in _NULL:
        return None
    if text[0] in _STARTS_NUMBER:
        return _number(text)
    return _BOOL.get(text, text)


def _number(text: str) -> Any:
    if len(text) > MAX_DIGITS:
        return text
    if _INT.match(text):
        return int(text)
    if _OCTAL_OR_HEX.match(text):
        return int(text, 0)
    if _FLOAT.match(text):
        return float(text)
    return float(text.replace(".", "")) if _SPECIAL_FLOAT.match(text) else text


def _syntax_error(error: yaml.YAMLError, text: str) -> tuple[Finding, int, int]:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None:
        said = ", ".join(part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part)
        lines = text.split("\n")[mark.line : mark.line + 1]
        hint = "indent with spaces, not tabs" if any("\t" in line for line in lines) else ""
        return Finding((), f"not YAML: {said}", hint), mark.line + 1, mark.column + 1
    position = getattr(error, "position", None)
    before = text[: position if isinstance(position, int) and position >= 0 else 0]
    reason = getattr(error, "reason", None) or str(error)
    return Finding((), f"not YAML: {reason}"), before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
