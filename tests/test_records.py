"""Event logs and attempt logs: written whole, read without gap or repeat, whatever a crash left behind."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.records import (
    EVENTS,
    STRUCTURED,
    Event,
    GrowingLines,
    RunOutput,
    Wanted,
    append_event,
    events_of,
    follow,
    follow_events,
    list_runs,
    new_event,
    run_dir,
)


class RunOnDisk:
    """Writes what activities and step hosts write."""

    def __init__(self, log_dir: Path, workflow_id: str = "flow", run_id: str = "run") -> None:
        self.key = (workflow_id, run_id)
        self.folder = run_dir(log_dir, workflow_id, run_id)

    def event(self, status: Any, step_id: str = "", attempt: int = 0, **fields: Any) -> None:
        append_event(self.folder, new_event(*self.key, status=status, step_id=step_id, attempt=attempt, **fields))

    def line(self, step_id: str, message: str, attempt: int = 1, stream: str = "stdout", partial: bool = False) -> None:
        record = {"stepId": step_id, "attempt": attempt, "stream": stream, "message": message, "partial": partial}
        self.raw(step_id, json.dumps(record).encode() + b"\n", attempt)

    def raw(self, step_id: str, data: bytes, attempt: int = 1) -> None:
        folder = self.folder / step_id / f"attempt-{attempt}"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / STRUCTURED).open("ab") as file:
            file.write(data)


@pytest.fixture
def disk(tmp_path: Path) -> RunOnDisk:
    """A run with records under `tmp_path`."""
    return RunOnDisk(tmp_path)


def messages(records: Iterator[dict[str, Any]]) -> list[str]:
    return [record["message"] for record in records]


def test_an_event_has_the_field_names_of_the_original(disk: RunOnDisk) -> None:
    folder = disk.folder / "build" / "attempt-2"
    disk.event("step_finished", "build", 2, exit_code=3, duration_s=1.5, message="failed", folder=folder)
    (line,) = (disk.folder / EVENTS).read_text().splitlines()
    event = json.loads(line)
    assert event.pop("timestamp").endswith("Z")
    assert event == {
        "workflowId": "flow",
        "runId": "run",
        "stepId": "build",
        "stepName": "build",
        "status": "step_finished",
        "exitCode": 3,
        "durationSec": 1.5,
        "stdoutPath": str(folder / "stdout.log"),
        "stderrPath": str(folder / "stderr.log"),
        "structuredPath": str(folder / STRUCTURED),
        "message": "failed",
        "attempt": 2,
    }
    assert events_of(disk.folder) == [Event.model_validate(json.loads(line))]


def test_torn_and_foreign_lines_are_passed_over(disk: RunOnDisk) -> None:
    disk.event("run_started")
    with (disk.folder / EVENTS).open("ab") as file:
        file.write(b'{"status": "nonsense"}\n\xff\xfe\n[1]\n{"timestamp": "2026')
    disk.event("run_finished", message="succeeded")
    assert [event.status for event in events_of(disk.folder)] == ["run_started", "run_finished"]


def test_an_unfinished_line_is_taken_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    lines = GrowingLines(path)
    assert list(lines.read()) == []
    path.write_bytes(b"one\ntw")
    assert list(lines.read()) == [b"one"]
    with path.open("ab") as file:
        file.write(b"o\n")
    assert list(lines.read()) == [b"two"]
    assert list(lines.read()) == []


@given(texts=st.lists(st.binary(max_size=8).filter(lambda data: b"\n" not in data)), size=st.integers(1, 7))
def test_lines_come_once_however_they_are_written(
    texts: list[bytes], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("lines") / "lines"
    data = b"".join(text + b"\n" for text in texts)
    lines, seen = GrowingLines(path), []
    for start in range(0, len(data), size):
        with path.open("ab") as file:
            file.write(data[start : start + size])
        seen += list(lines.read())
    assert seen == texts


def test_events_of_many_writers_are_all_there(disk: RunOnDisk) -> None:
    def write(number: int) -> None:
        for attempt in range(1, 26):
            disk.event("step_started", f"step-{number}", attempt, message="x" * 2000)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {(event.step_id, event.attempt) for event in events_of(disk.folder)} == {
        (f"step-{number}", attempt) for number in range(4) for attempt in range(1, 26)
    }


def test_output_of_every_attempt_in_the_order_they_began(disk: RunOnDisk) -> None:
    disk.event("run_started")
    for step_id, attempt in (("b", 1), ("a", 1), ("b", 2)):
        disk.event("step_started" if attempt == 1 else "step_retry", step_id, attempt)
        disk.line(step_id, f"{step_id}{attempt}", attempt)
    output = RunOutput(disk.folder)
    assert messages(output.read()) == ["b1", "a1", "b2"]
    assert not output.finished
    disk.line("a", "more")
    disk.event("step_finished", "a", 1)
    disk.event("run_finished")
    assert messages(output.read()) == ["more"]
    assert output.finished


def test_a_step_that_was_attached_to_again_is_shown_once(disk: RunOnDisk) -> None:
    output = RunOutput(disk.folder)
    disk.event("step_started", "a", 1)
    disk.line("a", "first")
    assert messages(output.read()) == ["first"]
    disk.event("step_started", "a", 1)
    disk.line("a", "second")
    disk.event("step_finished", "a", 1)
    assert messages(output.read()) == ["second"]
    disk.event("step_finished", "a", 1)
    assert messages(output.read()) == []


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Wanted(step_id="shard"), ["shard.0 out", "shard.1 out"]),
        (Wanted(step_id="shard.1"), ["shard.1 out"]),
        (Wanted(step_id="build", attempt=2), ["build out 2"]),
        (Wanted(stream="stderr"), ["build err"]),
    ],
)
def test_only_what_is_wanted(disk: RunOnDisk, wanted: Wanted, expected: list[str]) -> None:
    for step_id in ("shard.0", "shard.1", "shard.x", "build"):
        disk.event("step_started", step_id, 1)
        disk.line(step_id, f"{step_id} out")
    disk.line("build", "build err", stream="stderr")
    disk.event("step_retry", "build", 2)
    disk.line("build", "build out 2", attempt=2)
    assert messages(RunOutput(disk.folder, wanted).read()) == expected


def test_a_node_of_several_has_output_of_its_own(disk: RunOnDisk) -> None:
    disk.event("step_started", "a", 1)
    disk.line("a", "of rank 0")
    folder = disk.folder / "a" / "attempt-1" / "rank-1"
    folder.mkdir()
    (folder / "structured.jsonl").write_text('{"stream": "stdout", "message": "of rank 1"}\n')
    assert messages(RunOutput(disk.folder, Wanted(rank=1)).read()) == ["of rank 1"]


def test_broken_records_do_not_stop_the_reader(disk: RunOnDisk) -> None:
    disk.event("step_started", "a", 1)
    disk.raw("a", b'{"message": 3}\nno json\n\xff\n')
    disk.line("a", "good")
    disk.raw("a", b'{"message": "torn')
    assert messages(RunOutput(disk.folder).read()) == ["good"]


def test_following_ends_with_the_run_and_misses_nothing(disk: RunOnDisk) -> None:
    num_lines = 300

    def write() -> None:
        disk.event("run_started")
        disk.event("step_started", "a", 1)
        for number in range(num_lines):
            disk.line("a", str(number))
        disk.event("step_finished", "a", 1)
        disk.event("run_finished")

    writer = threading.Thread(target=write)
    writer.start()
    seen = messages(follow(RunOutput(disk.folder), poll_s=0.001))
    writer.join()
    assert seen == [str(number) for number in range(num_lines)]


def test_following_from_the_last_lines(disk: RunOnDisk) -> None:
    disk.event("step_started", "a", 1)
    for number in range(5):
        disk.line("a", str(number))
    records = follow(RunOutput(disk.folder), last=2, poll_s=0)
    assert [next(records)["message"], next(records)["message"]] == ["3", "4"]
    disk.line("a", "5")
    disk.event("run_finished")
    assert messages(records) == ["5"]


def test_following_a_run_that_ended_without_saying_so(disk: RunOnDisk) -> None:
    disk.event("step_started", "a", 1)
    disk.line("a", "last words")
    assert messages(follow(RunOutput(disk.folder), is_over=lambda: True, poll_s=0)) == ["last words"]


def test_following_events_gives_only_later_ones_and_ends(disk: RunOnDisk) -> None:
    disk.event("run_started")
    events = follow_events(disk.folder)
    disk.event("step_started", "a", 1)
    disk.event("run_finished")
    assert [event.status for event in events] == ["step_started", "run_finished"]
    assert list(follow_events(disk.folder)) == []


def test_runs_under_a_log_root(tmp_path: Path) -> None:
    older, newer = RunOnDisk(tmp_path, "team/flow", "1"), RunOnDisk(tmp_path, "other", "2")
    older.event("run_started", message="plan")
    older.event("step_started", "a", 1)
    older.event("step_finished", "a", 1)
    older.event("run_finished", message="failed")
    newer.event("run_started", message="plan")
    newer.event("step_started", "a", 1)
    (tmp_path / "empty" / "3").mkdir(parents=True)
    (tmp_path / "empty" / "3" / EVENTS).touch()
    found = list_runs(tmp_path)
    assert [(record.workflow_id, record.run_id, record.state) for record in found] == [
        ("other", "2", "running"),
        ("team/flow", "1", "failed"),
    ]
    assert [(record.num_ended, record.num_started) for record in found] == [(0, 1), (1, 1)]
    assert list_runs(tmp_path / "nowhere") == []
