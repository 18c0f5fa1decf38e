"""Hides secret values in a byte stream, also when a value is split over two writes."""

import base64
import re
from collections.abc import Iterable
from urllib.parse import quote

MASK = b"***"
_SHORTEST = 4
"""Shorter values are not masked: hiding every `a` would hide the log."""


def spellings(value: str) -> set[bytes]:
    """A secret as it may appear in a log: plain, base64 and percent-encoded, and its lines one by one."""
    plain = {value, value.strip(), *value.splitlines()}
    encoded = {base64.b64encode(text.encode()).decode().rstrip("=") for text in plain if text}
    quoted = {quote(text, safe="") for text in plain}
    return {text.encode() for text in plain | encoded | quoted if len(text) >= _SHORTEST}


class Masker:
    """Masks one stream. Bytes that may be the start of a secret are held back until the next write or `flush`."""

    def __init__(self, secrets: Iterable[str]) -> None:
        needles = sorted({needle for secret in secrets for needle in spellings(secret)}, key=len, reverse=True)
        self._needles = needles
        self._pattern = re.compile(b"|".join(map(re.escape, needles))) if needles else None
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """The part of the stream that is safe to write now."""
        if self._pattern is None:
            return data
        data = self._held + data
        cut = len(data) - self._possible_start(data)
        for match in self._pattern.finditer(data):
            if match.start() < cut < match.end():
                cut = match.start()
        self._held = data[cut:]
        return self._pattern.sub(MASK, data[:cut])

    def flush(self) -> bytes:
        """What was held back, because the stream has ended."""
        held, self._held = self._held, b""
        return self._pattern.sub(MASK, held) if self._pattern else held

    def _possible_start(self, data: bytes) -> int:
        """Length of the longest end of `data` that is the beginning of a secret."""
        longest = min(len(data), max(map(len, self._needles)) - 1)
        tail = data[len(data) - longest :]
        return max(
            (
                size
                for needle in self._needles
                for size in range(min(len(needle) - 1, longest), 0, -1)
                if tail.endswith(needle[:size])
            ),
            default=0,
        )


def mask_text(text: str, secrets: Iterable[str]) -> str:
    """`text` with every secret hidden."""
    masker = Masker(secrets)
    return (masker.feed(text.encode()) + masker.flush()).decode(errors="replace")
