"""The keys that encrypt what Temporal stores: a 0600 file of `key-id:base64(32 bytes)` lines, named by a variable.

The first key encrypts, all of them decrypt, so a new first line rotates; an old key is needed for as long as a run that
used it is kept. A key file that is configured and cannot be used is fatal: nothing falls back to plain text.
"""

import base64
import binascii
import os
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

KEYS_VARIABLE = "ORCHESTRATE_PAYLOAD_KEYS"
KEY_BYTES = 32
_KEY_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class PayloadKeyError(Exception):
    """A key is missing or wrong, or the file of keys cannot be used."""


class PayloadKeys:
    """The keys of one file. A key id that is not known yet is looked up again when the file has changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._load()

    def first(self) -> str:
        """Id of the key that encrypts."""
        return next(iter(self._keys))

    def find(self, key_id: str) -> bytes:
        """The key called `key_id`; `PayloadKeyError` when the file has no such line."""
        if key_id not in self._keys and self._stamp() != self._loaded:
            self._load()
        if key_id not in self._keys:
            raise PayloadKeyError(
                f"payload key `{key_id}` is not in `{self.path}`, which has {_listed(self._keys)}\n\n"
                f"hint: add the line of `{key_id}` to the file that `{KEYS_VARIABLE}` names, after the first line"
            )
        return self._keys[key_id]

    def _load(self) -> None:
        self._loaded = self._stamp()
        self._keys = read_keys(self.path)

    def _stamp(self) -> tuple[int, int]:
        try:
            status = self.path.stat()
        except OSError as error:
            raise _unusable(self.path, error) from error
        return status.st_mtime_ns, status.st_ino


def payload_keys(environment: Mapping[str, str] = os.environ) -> PayloadKeys | None:
    """The keys that `$ORCHESTRATE_PAYLOAD_KEYS` names, None when it is not set."""
    path = environment.get(KEYS_VARIABLE)
    return PayloadKeys(Path(path).expanduser()) if path else None


def read_keys(path: Path) -> dict[str, bytes]:
    """Keys by id, in the order of the file. Empty lines and `#` comments are skipped.

    Raises `PayloadKeyError` for a file that others can read, that has no key, or with a line that is not one; a key's
    value is never part of an error.
    """
    try:
        with path.open() as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            if mode & 0o077:
                raise PayloadKeyError(
                    f"payload key file `{path}` has mode {mode:04o}, wanted 0600\n\nhint: chmod 600 {path}"
                )
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(path, error) from error
    keys: dict[str, bytes] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        key_id, _, encoded = text.partition(":")
        if key_id in keys:
            raise PayloadKeyError(f"{path}:{number}: payload key `{key_id}` is there twice")
        keys[key_id] = _decoded(f"{path}:{number}", key_id, encoded)
    if not keys:
        raise PayloadKeyError(f"payload key file `{path}` has no key\n\nhint: orchestrate key new {path}")
    return keys


def new_key_line(key_id: str = "") -> str:
    """A fresh random key as a line of the file; its id is today's date and four random digits by default."""
    key_id = key_id or f"{time.strftime('%Y-%m-%d', time.gmtime())}-{secrets.token_hex(2)}"
    if not _KEY_ID.fullmatch(key_id):
        raise PayloadKeyError(f"key id is `{key_id}`, wanted up to 64 letters, digits, `_`, `.` or `-`")
    return f"{key_id}:{base64.b64encode(os.urandom(KEY_BYTES)).decode()}\n"


def _decoded(where: str, key_id: str, encoded: str) -> bytes:
    hint = f"\n\nhint: a line is `key-id:base64({KEY_BYTES} bytes)`; `orchestrate key new FILE` writes one"
    if not _KEY_ID.fullmatch(key_id):
        raise PayloadKeyError(f"{where}: no key id before `:`{hint}")
    try:
        key = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        raise PayloadKeyError(f"{where}: payload key `{key_id}` is not base64{hint}") from None
    if len(key) != KEY_BYTES:
        raise PayloadKeyError(f"{where}: payload key `{key_id}` has {len(key)} bytes, wanted {KEY_BYTES}{hint}")
    return key


def _listed(keys: Mapping[str, bytes]) -> str:
    return ", ".join(f"`{key_id}`" for key_id in keys)


def _unusable(path: Path, error: Exception) -> PayloadKeyError:
    return PayloadKeyError(
        f"payload key file `{path}` cannot be read: {error}\n\n"
        f"hint: `orchestrate key new {path}` writes one; unset `{KEYS_VARIABLE}` to run without encryption"
    )
