"""A run's records on disk: its event log, and the output of every attempt as JSON lines.

    <log_dir>/<workflow_id>/<run_id>/events.jsonl                                  written by `activities`
    <log_dir>/<workflow_id>/<run_id>/<step_id>/attempt-<n>/structured.jsonl, ...   written by the step's host

Readers follow growing files by byte offset and take whole lines only, so a torn last line is never seen and nothing is
seen twice. Lines that are no JSON are passed over: a reader never fails on what a crash left behind.
"""

import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

from steps._files import file_name

EVENTS, STRUCTURED = "events.jsonl", "structured.jsonl"
POLL_S = 0.2
LONGEST_MESSAGE = 8_000
"""Characters of an event's message."""
_BLOCK = 1 << 20

EventStatus = Literal[
    "run_started", "step_started", "step_retry", "step_skipped", "step_finished", "step_cancelled", "run_finished"
]
STARTS = ("step_started", "step_retry")
"""Statuses that begin an attempt; the first attempt is `step_started`, later ones are `step_retry`."""
ENDS = ("step_finished", "step_cancelled", "step_skipped")


class Event(BaseModel):
    """One line of `events.jsonl`. Its keys there are in camelCase: `workflowId`, `durationSec`."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=to_camel, populate_by_name=True)

    timestamp: str
    """UTC, RFC 3339."""
    workflow_id: str
    run_id: str
    step_id: str = ""
    step_name: str = ""
    status: EventStatus
    exit_code: int = 0
    """Of the process; -1 for one that was never started or was killed."""
    duration_sec: float = 0.0
    stdout_path: str = ""
    stderr_path: str = ""
    structured_path: str = ""
    message: str = ""
    """Of a `run_finished`: the outcome of the run."""
    attempt: int = 0
    """From 1; 0 for what is not an attempt."""


def run_dir(log_dir: str | Path, workflow_id: str, run_id: str) -> Path:
    """Folder of a run's records."""
    return Path(log_dir) / file_name(workflow_id) / run_id


def new_event(
    workflow_id: str,
    run_id: str,
    *,
    status: EventStatus,
    step_id: str = "",
    step_name: str = "",
    attempt: int = 0,
    exit_code: int | None = None,
    duration_s: float = 0.0,
    message: str = "",
    folder: Path | None = None,
) -> Event:
    """An event of now. `folder` is the attempt's; `exit_code` None is a step that has no exit code."""
    return Event(
        timestamp=datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        workflow_id=workflow_id,
        run_id=run_id,
        step_id=step_id,
        step_name=step_name or step_id,
        status=status,
        exit_code=exit_code or 0,
        duration_sec=round(duration_s, 6),
        stdout_path=str(folder / "stdout.log") if folder else "",
        stderr_path=str(folder / "stderr.log") if folder else "",
        structured_path=str(folder / STRUCTURED) if folder else "",
        message=message[:LONGEST_MESSAGE],
        attempt=attempt,
    )


def append_event(folder: Path, event: Event) -> None:
    """Add one line to the run's event log in one write; safe from several processes at once.

    `OSError` when it cannot be written.
    """
    line = event.model_dump_json(by_alias=True).encode()
    try:
        append_line(folder / EVENTS, line)
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True)
        append_line(folder / EVENTS, line)


def append_line(path: Path, line: bytes) -> None:
    """Add one line to a file of lines, in one write. `OSError` when it cannot be written whole."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        # A line torn by a full disk or a crash must not swallow this one.
        begin = b"\n" if size and os.pread(descriptor, 1, size - 1) != b"\n" else b""
        data = begin + line + b"\n"
        if os.write(descriptor, data) != len(data):
            raise OSError(f"`{path}`: a line was written in part only")
    finally:
        os.close(descriptor)


class GrowingLines:
    """The whole lines of a file that may still grow, or not exist yet."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self.offset = offset
        """Bytes taken so far: always the start of a line."""

    def read(self) -> Iterator[bytes]:
        """The lines completed since the last call."""
        try:
            file = self.path.open("rb")
        except (FileNotFoundError, NotADirectoryError):
            return
        with file:
            file.seek(self.offset)
            begun = b""
            while block := file.read(_BLOCK):
                *whole, begun = (begun + block).split(b"\n")
                for line in whole:
                    self.offset += len(line) + 1
                    yield line


def read_events(lines: GrowingLines) -> Iterator[Event]:
    """The events completed since the last call; lines that are none are passed over."""
    for line in lines.read():
        with contextlib.suppress(ValidationError):
            yield Event.model_validate_json(line)


def events_of(folder: Path) -> list[Event]:
    """Every event of a run so far."""
    return list(read_events(GrowingLines(folder / EVENTS)))


@dataclass(frozen=True)
class RunRecord:
    """A run that has an event log, as its first and last events tell."""

    folder: Path
    workflow_id: str
    run_id: str
    plan: str
    state: str
    """`running`, or the outcome."""
    first_at: str
    last_at: str
    """UTC, RFC 3339."""
    num_started: int
    num_ended: int


def list_runs(log_dir: Path) -> list[RunRecord]:
    """Every run under a log root, the latest first."""
    records = [found for path in log_dir.glob(f"*/*/{EVENTS}") if (found := _record_of(path.parent)) is not None]
    return sorted(records, key=lambda record: (record.last_at, record.run_id), reverse=True)


def _record_of(folder: Path) -> RunRecord | None:
    events = events_of(folder)
    if not events:
        return None
    finished = [event for event in events if event.status == "run_finished"]
    started = {event.step_id for event in events if event.status in STARTS}
    ended = {event.step_id for event in events if event.status in ENDS}
    return RunRecord(
        folder=folder,
        workflow_id=events[0].workflow_id,
        run_id=events[0].run_id,
        plan=next((event.message for event in events if event.status == "run_started"), ""),
        state=finished[-1].message or "finished" if finished else "running",
        first_at=events[0].timestamp,
        last_at=events[-1].timestamp,
        num_started=len(started | ended),
        num_ended=len(ended),
    )


@dataclass(frozen=True)
class Wanted:
    """Which output is asked for; the defaults are all of it."""

    step_id: str = ""
    attempt: int = 0
    stream: Literal["stdout", "stderr", "both"] = "both"
    rank: int = 0
    """Which node of steps that run on several; only those have others than 0."""

    def takes_attempt(self, event: Event) -> bool:
        """Whether the attempt of an event is asked for. A matrix step stands for its instances `<step id>.<number>`."""
        step_id, _, number = event.step_id.rpartition(".")
        same_step = self.step_id in ("", event.step_id) or (self.step_id == step_id and number.isdigit())
        return same_step and self.attempt in (0, event.attempt)

    def takes_record(self, record: dict[str, Any]) -> bool:
        """Whether a line of output is asked for."""
        return self.stream in ("both", record.get("stream"))


@dataclass
class RunOutput:
    """The output of a run's attempts, in the order they began, as far as it is written."""

    folder: Path
    wanted: Wanted = Wanted()
    finished: bool = False
    """True once the event log says that the run is over."""
    _events: GrowingLines = field(init=False)
    _open: dict[tuple[str, int], GrowingLines] = field(init=False, default_factory=dict)
    _ended: set[tuple[str, int]] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self._events = GrowingLines(self.folder / EVENTS)

    def read(self) -> Iterator[dict[str, Any]]:
        """The records completed since the last call: the keys of `structured.jsonl`.

        An event that ends an attempt is written after its last output: an attempt is read to its end once more after
        that event was seen, and then let go.
        """
        for event in read_events(self._events):
            key = (event.step_id, event.attempt)
            if event.status == "run_finished":
                self.finished = True
            elif event.attempt and key not in self._ended and self.wanted.takes_attempt(event):
                if key not in self._open:
                    path = self.folder / file_name(event.step_id) / f"attempt-{event.attempt}"
                    if self.wanted.rank:
                        path /= f"rank-{self.wanted.rank}"
                    path /= STRUCTURED
                    self._open[key] = GrowingLines(path)
                if event.status in ENDS:
                    self._ended.add(key)
        for key, lines in list(self._open.items()):
            for line in lines.read():
                record = _record(line)
                if record is not None and self.wanted.takes_record(record):
                    yield record
            if key in self._ended:
                del self._open[key]


def follow(
    output: RunOutput, last: int | None = None, is_over: Callable[[], bool] = lambda: False, poll_s: float = POLL_S
) -> Iterator[dict[str, Any]]:
    """Records as they come, until the run is over.

    Of what is there at first, only the `last` ones when given. `is_over` is asked after each round for a run that ended
    without saying so in its event log.
    """
    yield from output.read() if last is None else deque(output.read(), maxlen=last)
    while not output.finished:
        over = is_over()
        yield from output.read()
        if over:
            return
        time.sleep(0 if output.finished else poll_s)


def follow_events(folder: Path, poll_s: float = POLL_S) -> Iterator[Event]:
    """Events that come after this call, until the run is over."""
    lines = GrowingLines(folder / EVENTS)
    statuses = {event.status for event in read_events(lines)}

    def later() -> Iterator[Event]:
        while "run_finished" not in statuses:
            for event in read_events(lines):
                statuses.add(event.status)
                yield event
            time.sleep(0 if "run_finished" in statuses else poll_s)

    return later()


def _record(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        value = json.loads(line)
        if isinstance(value, dict) and isinstance(value.get("message"), str):
            return value
    return None
