"""Logs of an attempt: exact bytes, one record for each line, bounded memory, and a tail that cuts no character."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steps import StepRequest
from steps._logs import LONGEST_RECORD, AttemptLogs, Capture, tail


@pytest.fixture
def logs(tmp_path: Path, step_request: Callable[..., StepRequest]) -> AttemptLogs:
    return AttemptLogs(step_request("a b"), tmp_path, ["hush-hush"])


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "structured.jsonl").read_text().split("\n") if line]


def messages(folder: Path) -> list[tuple[str, bool]]:
    return [(record["message"], record["partial"]) for record in records(folder)]


def test_a_record_has_the_fields_of_the_contract(logs: AttemptLogs, tmp_path: Path) -> None:
    logs.write("stderr", "grüß\u2028e\n".encode())
    logs.close()
    (record,) = records(tmp_path)
    timestamp = record.pop("timestamp")
    assert timestamp.endswith("Z") and len(timestamp) == len("2026-01-01T00:00:00.000000Z")
    assert record == {
        "workflowId": "flow",
        "runId": "run",
        "stepId": "a b",
        "stepName": "a b",
        "attempt": 1,
        "stream": "stderr",
        "message": "grüß\u2028e",
        "partial": False,
    }


def test_progress_bars_become_records_and_crlf_one_line(logs: AttemptLogs, tmp_path: Path) -> None:
    for piece in (b"10%\r20%", b"\r30%\r", b"\ndone\r", b"\n\nlast"):
        logs.write("stdout", piece)
    logs.close()
    assert messages(tmp_path) == [(text, False) for text in ("10%", "20%", "30%", "done", "")] + [("last", True)]
    assert (tmp_path / "stdout.log").read_bytes() == b"10%\r20%\r30%\r\ndone\r\n\nlast"


def test_characters_split_over_reads_and_binary_output_survive(logs: AttemptLogs, tmp_path: Path) -> None:
    data = "ä€😀\n".encode() + b"\xff\x00\xfe\n" + "é".encode()[:1]
    for byte in data:
        logs.write("stdout", bytes([byte]))
    logs.close()
    assert [text for text, _ in messages(tmp_path)] == ["ä€😀", "\ufffd\x00\ufffd", "\ufffd"]
    assert (tmp_path / "stdout.log").read_bytes() == data


@pytest.mark.parametrize("size", [1, 7, 65_536, 3_000_000])
def test_a_line_of_a_megabyte_is_cut_into_partial_records(logs: AttemptLogs, tmp_path: Path, size: int) -> None:
    data = b"x" * 1_000_000 + b"\nend\n"
    for at in range(0, len(data), max(size, 1000)):
        logs.write("stdout", data[at : at + max(size, 1000)])
    logs.close()
    found = messages(tmp_path)
    assert "".join(text for text, _ in found) == "x" * 1_000_000 + "end"
    assert max(len(text) for text, _ in found) <= LONGEST_RECORD
    assert [partial for _, partial in found].count(False) == 2


def test_secrets_are_hidden_in_all_files(logs: AttemptLogs, tmp_path: Path) -> None:
    for piece in (b"a hush", b"-", b"hush b", b" hush-"):
        logs.write("stdout", piece)
    logs.close()
    assert (tmp_path / "stdout.log").read_bytes() == b"a *** b hush-"
    assert messages(tmp_path) == [("a *** b hush-", True)]


def test_writing_after_the_end_and_to_a_full_disk_is_harmless(
    tmp_path: Path, step_request: Callable[..., StepRequest]
) -> None:
    (tmp_path / "stdout.log").symlink_to("/dev/full")
    logs = AttemptLogs(step_request(), tmp_path, [])
    logs.write("stdout", b"lost\n")
    logs.write("stderr", b"kept\n")
    logs.close()
    logs.write("stderr", b"late\n")
    assert (tmp_path / "stderr.log").read_text() == "kept\n"


CAPTURE = """
import os, sys, subprocess, threading, ctypes
from pathlib import Path
from steps import StepRequest
from steps._logs import AttemptLogs, Capture
request = StepRequest.model_validate_json(sys.argv[1])
folder = Path(sys.argv[2])
logs = AttemptLogs(request, folder, [])
rang = threading.Event()
"""


def run_capture(body: str, folder: Path, request: StepRequest, **options: Any) -> None:
    argv = [sys.executable, "-W", "error", "-c", CAPTURE + body, request.model_dump_json(), str(folder)]
    subprocess.run(argv, check=True, timeout=60, **options)


@pytest.mark.parametrize("closed", [(), (1,), (2,), (0, 1, 2)])
def test_everything_printed_is_captured_also_where_descriptors_were_closed(
    closed: tuple[int, ...], tmp_path: Path, step_request: Callable[..., StepRequest]
) -> None:
    body = f"""
for fd in {closed}:
    os.close(fd)
with Capture(logs, 60, rang.set):
    print("python")
    os.write(2, b"descriptor\\n")
    subprocess.run(["sh", "-c", "echo child; echo child-error >&2"], check=True)
    ctypes.CDLL(None).puts(b"from C")
    print("last")
logs.close()
assert not rang.is_set()
"""
    run_capture(body, tmp_path, step_request(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert sorted((tmp_path / "stdout.log").read_text().splitlines()) == ["child", "from C", "last", "python"]
    assert (tmp_path / "stderr.log").read_text() == "descriptor\nchild-error\n"


def test_the_alarm_rings_once_when_the_time_is_over_or_earlier(tmp_path: Path, logs: AttemptLogs) -> None:
    for limit_s, ring in ((0.01, False), (1e9, True)):
        rang = threading.Semaphore(0)
        with Capture(logs, limit_s, rang.release) as capture:
            if ring:
                capture.ring()
                capture.ring()
            assert rang.acquire(timeout=30)
        assert not rang.acquire(blocking=False)
        capture.ring()


def test_the_alarm_rings_when_the_step_has_closed_its_own_output(tmp_path: Path, logs: AttemptLogs) -> None:
    rang = threading.Event()
    with Capture(logs, 0.05, rang.set):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.close(null)
        assert rang.wait(30)


def test_a_process_that_keeps_the_pipe_open_does_not_hang_the_end(tmp_path: Path, logs: AttemptLogs) -> None:
    with Capture(logs, 60, lambda: None):
        process = subprocess.Popen(["sh", "-c", "echo hello; exec sleep 300"])
        deadline = time.monotonic() + 30
        while not (tmp_path / "stdout.log").read_bytes() and time.monotonic() < deadline:
            time.sleep(0.005)
    logs.close()
    process.kill()
    process.wait()
    assert (tmp_path / "stdout.log").read_text() == "hello\n"


def test_a_hundred_megabytes_pass_in_bounded_memory(tmp_path: Path, step_request: Callable[..., StepRequest]) -> None:
    body = """
import resource
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with Capture(logs, 600, rang.set):
    line = "a line of output with some length, as they come in builds and trainings"
    subprocess.run(["sh", "-c", f"yes '{line}' | head -c 100000000"], check=True)
logs.close()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert after - before < 20_000, (before, after)
"""
    run_capture(body, tmp_path, step_request())
    assert (tmp_path / "stdout.log").stat().st_size == 100_000_000
    for name in ("stdout.log", "structured.jsonl"):
        (tmp_path / name).unlink()


@given(st.lists(st.one_of(st.text("aé€😀\n"), st.binary(max_size=5)), max_size=12), st.integers(0, 40))
def test_tail_is_the_end_of_the_text(pieces: list[str | bytes], limit: int) -> None:
    data = b"".join(piece.encode() if isinstance(piece, str) else piece for piece in pieces)
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        text, cut = tail(Path(file.name), limit)
    assert cut == (len(data) > limit)
    assert len(text) <= limit
    try:
        whole = data.decode()
    except UnicodeDecodeError:
        return
    # The longest end of the text that fits.
    assert text == next(whole[at:] for at in range(len(whole) + 1) if len(whole[at:].encode()) <= limit)


def test_tail_of_a_log_that_ends_inside_a_character_or_is_missing(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes("ab€".encode()[:-1])
    assert tail(tmp_path / "log", 100) == ("ab", False)
    assert tail(tmp_path / "missing", 100) == ("", False)
