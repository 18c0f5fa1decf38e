"""What Temporal stores of a run: pydantic JSON -> compressed -> encrypted -> by file when it is still large.

    value -> PydanticPayloadConverter -> PlanCodec -> FileStorageDriver -> Temporal

External storage comes after the codec, so that files hold the same ciphertext Temporal would. Without keys payloads are
compressed only. Payloads that never saw this codec decode as they are. A wrong or missing key is fatal for whoever
reads: a workflow task waits for a worker that has the key, a client gets the error.
"""

import asyncio
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from temporalio.api.common.v1 import Payload
from temporalio.contrib.pydantic import PydanticPayloadConverter
from temporalio.converter import (
    DataConverter,
    DefaultFailureConverter,
    DefaultFailureConverterWithEncodedAttributes,
    ExternalStorage,
    PayloadCodec,
)

from bridge.payload_keys import PayloadKeyError, PayloadKeys, payload_keys
from bridge.payloads import STORED_FROM_BYTES, FileStorageDriver, payload_dir
from bridge.state import State

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

COMPRESSED_FROM_BYTES = 1024
THREADED_FROM_BYTES = 128 * 1024
"""Larger payloads are worked on in a thread, so that the worker's loop goes on."""
_ZLIB_LEVEL = 3
_ZLIB = b"binary/orchestrate-zlib"
_AES = b"binary/orchestrate-aes256gcm"
_KEY_ID = "orchestrate-key-id"
_NONCE_BYTES = 12


class PlanCodec(PayloadCodec):
    """Compresses what is large, and encrypts everything when it has keys."""

    def __init__(self, keys: PayloadKeys | None = None) -> None:
        self._keys = keys
        self._ciphers: dict[str, AESGCM] = {}

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        """Compress payloads over 1 KiB where that makes them smaller, then encrypt all with the first key."""
        return await _each(payloads, self._encoded)

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        """Undo `encode`. Raises `PayloadKeyError` naming the key id that is unknown or does not fit."""
        return await _each(payloads, self._decoded)

    def _encoded(self, payload: Payload) -> Payload:
        payload = _compressed(payload)
        if self._keys is None:
            return payload
        key_id = self._keys.first()
        nonce = os.urandom(_NONCE_BYTES)
        data = nonce + self._cipher(key_id).encrypt(nonce, payload.SerializeToString(), key_id.encode())
        return Payload(metadata={"encoding": _AES, _KEY_ID: key_id.encode()}, data=data)

    def _decoded(self, payload: Payload) -> Payload:
        if payload.metadata.get("encoding") == _AES:
            payload = self._decrypted(payload)
        if payload.metadata.get("encoding") == _ZLIB:
            payload = Payload.FromString(zlib.decompress(payload.data))
        return payload

    def _decrypted(self, payload: Payload) -> Payload:
        from cryptography.exceptions import InvalidTag

        key_id = payload.metadata.get(_KEY_ID, b"").decode(errors="replace")
        nonce, data = payload.data[:_NONCE_BYTES], payload.data[_NONCE_BYTES:]
        try:
            return Payload.FromString(self._cipher(key_id).decrypt(nonce, data, key_id.encode()))
        except (InvalidTag, ValueError):
            raise PayloadKeyError(
                f"payload key `{key_id}` does not decrypt what was encrypted under that id\n\n"
                f"hint: the line of `{key_id}` in the key file is another key, or the payload was changed"
            ) from None

    def _cipher(self, key_id: str) -> "AESGCM":
        if key_id not in self._ciphers:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM

            if self._keys is None:
                raise PayloadKeyError(
                    f"a payload is encrypted with key `{key_id}`, and no keys are configured\n\n"
                    "hint: set `ORCHESTRATE_PAYLOAD_KEYS` to the file that has it"
                )
            self._ciphers[key_id] = AESGCM(self._keys.find(key_id))
        return self._ciphers[key_id]


def data_converter(state: State, environment: Mapping[str, str] = os.environ) -> DataConverter:
    """The data converter of every client and worker. Raises `PayloadKeyError` when configured keys cannot be used.

    With keys, messages and stack traces of failures are encrypted too. Ids, types and search attributes never are.
    """
    keys = payload_keys(environment)
    return DataConverter(
        payload_converter_class=PydanticPayloadConverter,
        payload_codec=PlanCodec(keys),
        failure_converter_class=DefaultFailureConverterWithEncodedAttributes if keys else DefaultFailureConverter,
        external_storage=ExternalStorage(
            drivers=[FileStorageDriver(payload_dir(state, environment))],
            payload_size_threshold=STORED_FROM_BYTES,
        ),
    )


async def _each(payloads: Iterable[Payload], change: Callable[[Payload], Payload]) -> list[Payload]:
    return [
        change(payload) if len(payload.data) < THREADED_FROM_BYTES else await asyncio.to_thread(change, payload)
        for payload in payloads
    ]


def _compressed(payload: Payload) -> Payload:
    if len(payload.data) <= COMPRESSED_FROM_BYTES:
        return payload
    data = zlib.compress(payload.SerializeToString(), _ZLIB_LEVEL)
    if len(data) >= len(payload.data):
        return payload
    return Payload(metadata={"encoding": _ZLIB}, data=data)
