"""Secrets in a byte stream: hidden wherever a write ends, whatever they look like, and nothing else is."""

import base64
import json
import shlex
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steps._masking import Masker, mask_text, mask_value, spellings

TOKEN = "s3cr3t-T0ken/with+odd=chars"


def masked(pieces: list[bytes], secrets: list[str]) -> bytes:
    masker = Masker(secrets)
    return b"".join(masker.feed(piece) for piece in pieces) + masker.flush()


def oracle(data: bytes, secrets: list[str]) -> bytes:
    """Slow and obvious: mark every byte of every secret, then write one mask for each run of overlapping ones."""
    needles = {needle for secret in secrets for needle in spellings(secret)}
    spans = sorted((at, at + len(n)) for n in needles for at in range(len(data)) if data.startswith(n, at))
    merged: list[list[int]] = []
    for start, end in spans:
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([start, end])
    result, position = b"", 0
    for start, end in merged:
        result += data[position:start] + b"***"
        position = end
    return result + data[position:]


@pytest.mark.parametrize("first", range(len(TOKEN) + 5))
def test_a_secret_split_over_two_or_three_writes_is_hidden(first: int) -> None:
    data = f"a {TOKEN} b".encode()
    assert masked([data[:first], data[first:]], [TOKEN]) == b"a *** b"
    for second in range(first, len(data)):
        assert masked([data[:first], data[first:second], data[second:]], [TOKEN]) == b"a *** b"


@given(
    st.lists(st.text("ab", min_size=4, max_size=7), min_size=1, max_size=3),
    st.lists(st.text("abc", max_size=9).map(str.encode), max_size=8),
)
def test_overlapping_and_prefixed_secrets_are_hidden_however_the_stream_is_cut(
    secrets: list[str], pieces: list[bytes]
) -> None:
    assert masked(pieces, secrets) == oracle(b"".join(pieces), secrets)


def test_a_secret_that_begins_another_waits_for_the_longer_one() -> None:
    assert masked([b"pass", b"word", b"123 password"], ["password", "password123"]) == b"*** ***"


def test_multi_line_secrets_are_hidden_whole_and_line_by_line() -> None:
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBg\nkqhkiG9w0BAQ\n-----END KEY-----\n"
    assert masked([key.encode()], [key]) == b"***"
    assert masked([b"line: kqhkiG9w0BAQ!"], [key]) == b"line: ***!"


@pytest.mark.parametrize("prefix", ["", "u", "us", "user:"])
def test_base64_is_hidden_at_every_place_in_a_longer_text(prefix: str) -> None:
    header = base64.b64encode(f"{prefix}{TOKEN}".encode()).decode()
    core = base64.b64encode(TOKEN.encode()).decode().rstrip("=")
    out = mask_text(f"Authorization: Basic {header}", [TOKEN])
    assert "***" in out
    assert core not in out and len(out) < len("Authorization: Basic ***") + len(prefix) * 2 + 6


def test_encoded_spellings_are_hidden() -> None:
    odd = "p\"w d'\\$&é\n2nd-line"
    for text in (quote(odd, safe=""), json.dumps(odd)[1:-1], shlex.quote(odd), base64.urlsafe_b64encode(odd.encode())):
        written = text if isinstance(text, str) else text.decode().rstrip("=")
        assert mask_text(f"<{written}>", [odd]) == "<***>"


def test_short_values_and_streams_without_secrets_pass() -> None:
    assert masked([b"abc abc"], ["abc"]) == b"abc abc"
    assert masked([b"\xff\x00"], []) == b"\xff\x00"


def test_values_inside_json_are_hidden() -> None:
    value = {"a": [f"x{TOKEN}", 3], TOKEN: None}
    assert mask_value(value, [TOKEN]) == {"a": ["x***", 3], "***": None}


def test_a_stream_of_near_misses_is_not_held_back() -> None:
    masker = Masker(["aaaaaaaab"])
    written = sum(len(masker.feed(b"a" * 1000)) for _ in range(100))
    assert written >= 100_000 - 8
