"""Hides secret values in a byte stream, also when a value is split over writes or two values overlap."""

import base64
import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

MASK = b"***"
_SHORTEST = 4
"""Shorter values are not masked: hiding every `a` would hide the log."""


def spellings(value: str) -> set[bytes]:
    """A secret as a log may show it: plain, base64, percent-encoded, in JSON or a shell, and its lines one by one."""
    plain = {value, value.strip(), *value.splitlines()}
    written = {spell(text) for text in plain for spell in (str, _in_json, _percent, quote_plus, shlex.quote)}
    encoded = {spelling for text in plain if len(text) >= _SHORTEST for spelling in _base64(text.encode())}
    return {spelling for spelling in {*map(str.encode, written), *encoded} if len(spelling) >= _SHORTEST}


class Masker:
    """Masks one stream. Bytes that may be the start of a secret are held back until the next write or `flush`."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._needles = sorted({needle for secret in secrets for needle in spellings(secret)})
        self._held = b""
        self._covered = 0
        """How many of the held bytes belong to a secret whose mask is written already."""

    def feed(self, data: bytes) -> bytes:
        """The part of the stream that is safe to write now."""
        return self._mask(data, final=False) if self._needles else data

    def flush(self) -> bytes:
        """What was held back, because the stream has ended."""
        return self._mask(b"", final=True)

    def _mask(self, data: bytes, *, final: bool) -> bytes:
        data = self._held + data
        cut = len(data) if final else self._possible_start(data)
        written, position, covered = [], self._covered, 0
        for start, end in self._spans(data):
            if start >= cut:
                break
            if start > 0 or not self._covered:
                written += [data[position:start], MASK]
            position, covered = min(end, cut), max(0, end - cut)
        # A secret that began before these bytes and ends behind the cut.
        covered = max(covered, self._covered - cut)
        written.append(data[position:cut])
        self._held, self._covered = data[cut:], covered
        return b"".join(written)

    def _spans(self, data: bytes) -> list[tuple[int, int]]:
        """Where secrets stand in `data`, in order, overlapping ones as one."""
        found = [(0, self._covered)] if self._covered else []
        for needle in self._needles:
            start = data.find(needle)
            while start >= 0:
                found.append((start, start + len(needle)))
                start = data.find(needle, start + 1)
        found.sort()
        spans: list[tuple[int, int]] = []
        for start, end in found:
            if spans and start < spans[-1][1]:
                spans[-1] = spans[-1][0], max(end, spans[-1][1])
            else:
                spans.append((start, end))
        return spans

    def _possible_start(self, data: bytes) -> int:
        """Where the longest end of `data` starts that is the beginning of a secret."""
        earliest = len(data)
        for needle in self._needles:
            start = data.find(needle[:1], max(0, len(data) - len(needle) + 1), earliest)
            while start >= 0:
                if needle.startswith(data[start:]):
                    earliest = start
                    break
                start = data.find(needle[:1], start + 1, earliest)
        return earliest


def mask_text(text: str, secrets: Iterable[str]) -> str:
    """`text` with every secret hidden."""
    masker = Masker(secrets)
    return (masker.feed(text.encode(errors="backslashreplace")) + masker.flush()).decode(errors="replace")


def mask_value(value: Any, secrets: Iterable[str]) -> Any:
    """A JSON value with every secret hidden in its texts and keys."""
    if isinstance(value, str):
        return mask_text(value, secrets)
    if isinstance(value, dict):
        return {mask_text(key, secrets): mask_value(item, secrets) for key, item in value.items()}
    if isinstance(value, list):
        return [mask_value(item, secrets) for item in value]
    return value


def mask_file(path: Path, secrets: Iterable[str]) -> None:
    """Hide every secret in a file, when there is one."""
    masker = Masker(secrets)
    hidden = path.with_name(f".{path.name}.masked")
    try:
        with path.open("rb") as source, hidden.open("wb") as target:
            while data := source.read(1 << 16):
                target.write(masker.feed(data))
            target.write(masker.flush())
    except FileNotFoundError:
        return
    hidden.replace(path)


def _percent(text: str) -> str:
    return quote(text, safe="")


def _in_json(text: str) -> str:
    return json.dumps(text)[1:-1]


def _base64(data: bytes) -> set[bytes]:
    """The base64 of `data` at each of its three places in a longer text, without what its neighbours change."""
    found = set()
    for shift in range(3):
        encoded = base64.b64encode(b"\0" * shift + data).rstrip(b"=")
        start = (shift * 8 + 5) // 6
        inner = encoded[start : (shift + len(data)) * 8 // 6]
        found |= {encoded} if shift == 0 else set()
        found |= {inner, inner.translate(bytes.maketrans(b"+/", b"-_"))}
    return found
