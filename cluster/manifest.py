"""The hash of a folder's content: names, kinds, whether files can be executed, and what is in them."""

import hashlib
import json
from typing import Literal

Kind = Literal["file", "folder", "link"]


class Manifest:
    """Add every entry in the order of the names; both ends of a transfer then come to the same hash."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, name: str, kind: Kind, mode: int = 0, content: str = "") -> None:
        """`content` is the hash of a file, or the target of a link."""
        entry = [name, kind, bool(mode & 0o100), content]
        self._digest.update(json.dumps(entry).encode() + b"\n")

    @property
    def hash(self) -> str:
        """64 hex digits."""
        return self._digest.hexdigest()
