import asyncio
import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from temporalio.api.common.v1 import Payload
from temporalio.api.failure.v1 import Failure
from temporalio.converter import DataConverter
from temporalio.exceptions import ApplicationError

from bridge.codec import PlanCodec, data_converter
from bridge.payload_keys import KEYS_VARIABLE, PayloadKeyError, PayloadKeys, new_key_line, payload_keys, read_keys
from bridge.state import State
from steps import StepResult


def key_file(folder: Path, *lines: str) -> Path:
    path = folder / "keys"
    path.write_text("".join(lines))
    path.chmod(0o600)
    return path


def payload(value: object) -> Payload:
    return Payload(metadata={"encoding": b"json/plain"}, data=json.dumps(value).encode())


def encoded(codec: PlanCodec, *payloads: Payload) -> list[Payload]:
    return asyncio.run(codec.encode(payloads))


def decoded(codec: PlanCodec, *payloads: Payload) -> list[Payload]:
    return asyncio.run(codec.decode(payloads))


def test_small_payload_stays_readable_without_keys() -> None:
    small = payload({"a": 1})
    assert encoded(PlanCodec(), small) == [small]


def test_large_payload_is_compressed() -> None:
    large = payload(["the same text"] * 1000)
    [stored] = encoded(PlanCodec(), large)
    assert len(stored.data) < len(large.data) / 20
    assert decoded(PlanCodec(), stored) == [large]


def test_payload_that_does_not_shrink_is_left_alone() -> None:
    noise = Payload(metadata={"encoding": b"binary/plain"}, data=os.urandom(5000))
    assert encoded(PlanCodec(), noise) == [noise]


@given(data=st.binary(max_size=3000), repeat=st.integers(1, 100))
def test_round_trip(data: bytes, repeat: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    keys = PayloadKeys(key_file(tmp_path_factory.mktemp("keys"), new_key_line("one")))
    original = Payload(metadata={"encoding": b"binary/plain", "other": b"x"}, data=data * repeat)
    for codec in (PlanCodec(), PlanCodec(keys)):
        stored = encoded(codec, original, original)
        assert decoded(codec, *stored) == [original, original]


def test_everything_is_encrypted_with_keys(tmp_path: Path) -> None:
    codec = PlanCodec(PayloadKeys(key_file(tmp_path, new_key_line("one"))))
    stored = encoded(codec, payload("hunter2"), payload("hunter2"), payload("hunter2" * 1000))
    assert all(b"hunter" not in item.SerializeToString() for item in stored)
    assert stored[0].data != stored[1].data, "a nonce was used twice"
    assert len(stored[2].data) < 500, "encrypted before it was compressed"


def test_rotation_first_key_encrypts_all_decrypt(tmp_path: Path) -> None:
    old, new = new_key_line("old"), new_key_line("new")
    [before] = encoded(PlanCodec(PayloadKeys(key_file(tmp_path, old))), payload("x"))
    rotated = PlanCodec(PayloadKeys(key_file(tmp_path, new, old)))
    assert decoded(rotated, before) == [payload("x")]
    [after] = encoded(rotated, payload("x"))
    assert after.metadata["orchestrate-key-id"] == b"new"


def test_running_process_finds_a_key_that_was_added_to_its_file(tmp_path: Path) -> None:
    old, new = new_key_line("old"), new_key_line("new")
    running = PlanCodec(PayloadKeys(key_file(tmp_path, old)))
    encoded(running, payload("x"))
    [stored] = encoded(PlanCodec(PayloadKeys(key_file(tmp_path, new, old))), payload("y"))
    assert decoded(running, stored) == [payload("y")]


def test_unknown_key_is_named(tmp_path: Path) -> None:
    [stored] = encoded(PlanCodec(PayloadKeys(key_file(tmp_path, new_key_line("one")))), payload("x"))
    two = PlanCodec(PayloadKeys(key_file(tmp_path, new_key_line("two"))))
    with pytest.raises(PayloadKeyError, match=r"`one` is not in .*, which has `two`\n\nhint: "):
        decoded(two, stored)
    with pytest.raises(PayloadKeyError, match="encrypted with key `one`, and no keys are configured"):
        decoded(PlanCodec(), stored)


def test_wrong_key_under_the_same_id_is_named(tmp_path: Path) -> None:
    [stored] = encoded(PlanCodec(PayloadKeys(key_file(tmp_path, new_key_line("one")))), payload("x"))
    other = PlanCodec(PayloadKeys(key_file(tmp_path, new_key_line("one"))))
    with pytest.raises(PayloadKeyError, match="`one` does not decrypt"):
        decoded(other, stored)


def test_key_id_is_bound_to_the_payload(tmp_path: Path) -> None:
    line = new_key_line("one")
    codec = PlanCodec(PayloadKeys(key_file(tmp_path, line, line.replace("one:", "two:"))))
    [stored] = encoded(codec, payload("x"))
    stored.metadata["orchestrate-key-id"] = b"two"
    with pytest.raises(PayloadKeyError, match="`two` does not decrypt"):
        decoded(codec, stored)


def test_damaged_payload_is_refused(tmp_path: Path) -> None:
    codec = PlanCodec(PayloadKeys(key_file(tmp_path, new_key_line("one"))))
    [stored] = encoded(codec, payload("x"))
    for data in (stored.data[:-1], stored.data[:5], b"", stored.data[:20] + b"\0" + stored.data[21:]):
        damaged = Payload(metadata=stored.metadata, data=data)
        with pytest.raises(PayloadKeyError, match="`one`"):
            decoded(codec, damaged)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_key_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path, new_key_line())
    path.chmod(mode)
    with pytest.raises(PayloadKeyError, match=f"mode {mode:04o}, wanted 0600"):
        PayloadKeys(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no key"),
        ("# only this\n\n", "has no key"),
        ("one\n", ":1: payload key `one` has 0 bytes, wanted 32"),
        (":AAAA\n", ":1: no key id"),
        ("one:%%%\n", ":1: payload key `one` is not base64"),
        ("#\none:QUJD\n", ":2: payload key `one` has 3 bytes"),
    ],
)
def test_bad_key_file_says_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(PayloadKeyError, match=re.escape(message)):
        read_keys(key_file(tmp_path, text))


def test_key_twice_is_refused_and_no_key_is_shown(tmp_path: Path) -> None:
    line = new_key_line("one")
    with pytest.raises(PayloadKeyError, match=":2: payload key `one` is there twice") as caught:
        read_keys(key_file(tmp_path, line, line))
    assert line.partition(":")[2].strip() not in str(caught.value)


def test_missing_key_file_is_fatal(tmp_path: Path) -> None:
    with pytest.raises(PayloadKeyError, match="cannot be read"):
        payload_keys({KEYS_VARIABLE: str(tmp_path / "none")})


def test_keys_are_32_random_bytes() -> None:
    first, second = (new_key_line("a").strip().partition(":")[2] for _ in range(2))
    assert first != second
    assert len(base64.b64decode(first)) == 32


async def test_converter_reads_what_was_written_without_a_codec(tmp_path: Path) -> None:
    plain = await DataConverter.default.encode([{"a": 1}, None, b"x"])
    environment = {KEYS_VARIABLE: str(key_file(tmp_path, new_key_line()))}
    for converter in (data_converter(State(tmp_path), {}), data_converter(State(tmp_path), environment)):
        assert await converter.decode(plain) == [{"a": 1}, None, b"x"]


async def test_converter_carries_models(tmp_path: Path) -> None:
    converter = data_converter(State(tmp_path), {KEYS_VARIABLE: str(key_file(tmp_path, new_key_line()))})
    result = StepResult(outcome="succeeded", outputs={"text": "hunter2"})
    stored = await converter.encode([result])
    assert b"hunter2" not in stored[0].SerializeToString()
    assert await converter.decode(stored, [StepResult]) == [result]


async def test_messages_of_failures_are_encrypted(tmp_path: Path) -> None:
    converter = data_converter(State(tmp_path), {KEYS_VARIABLE: str(key_file(tmp_path, new_key_line()))})
    failure = Failure()
    await converter.encode_failure(ApplicationError("hunter2", "hunter2 too", type="Kind"), failure)
    assert b"hunter2" not in failure.SerializeToString()
    error = await converter.decode_failure(failure)
    assert isinstance(error, ApplicationError)
    assert (error.message, error.details, error.type) == ("hunter2", ("hunter2 too",), "Kind")


async def test_large_payload_on_disk_is_encrypted(tmp_path: Path) -> None:
    converter = data_converter(State(tmp_path), {KEYS_VARIABLE: str(key_file(tmp_path, new_key_line()))})
    value = "hunter2" + base64.b64encode(os.urandom(400_000)).decode()
    stored = await converter.encode([value])
    [file] = [path for path in (tmp_path / "payloads").rglob("*") if path.is_file()]
    assert b"hunter2" not in file.read_bytes()
    assert await converter.decode(stored) == [value]


def test_cryptography_is_imported_only_with_keys() -> None:
    program = "import sys, bridge.codec as c; c.PlanCodec(); sys.exit('cryptography' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
