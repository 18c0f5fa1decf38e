"""The familiar files of one run of a job, kept up to date by whoever looks; one at a time, whatever dies meanwhile.

    <root>/bazel_cache/zephyr_jobs/<job>-<run>.status   one line: START | PROGRESS | DONE | FAILED | STOPPED | LOST
    <root>/bazel_cache/zephyr_jobs/<job>.status         link to that of the job's newest run
    <root>/bazel_cache/zephyr_jobs/<job>-<run>.jsonl    {"ts", "event", "job", "msg"} a line
    <root>/logs/<job>-<run>.log                         what the command printed, both streams
    <root>/logs/<job>-<run>.pid                         process on this machine whose SIGTERM stops the job

Truth is `kept.json` beside the record. It is written first; the others follow from it and from the attempts' logs, so
what is missing or half written is put right by the next `catch_up`.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from bridge.jobs import GOING_ON, STEP_ID, JobRecord, State
from bridge.records import STRUCTURED, GrowingLines, append_line
from steps._files import HOST, read_json, write_whole

KEPT = "kept.json"
LOCK_TIMEOUT_S = 20.0
LOCK_POLL_S = 0.02


@dataclass
class Kept:
    """What is known of a run of a job."""

    state: State = "START"
    at: float = 0.0
    """Unix time of the status line, seconds."""
    msg: str = ""
    rc: int | None = None
    """Exit code; of a job without one 124 when its time was over and 125 when it could not run."""
    heartbeat_at: float = 0.0
    """When somebody who runs the job last said so."""
    ended_at: float | None = None
    run_id: str = ""
    """Of the workflow; empty before a worker has taken it."""
    attempt: int = 1
    """The attempt whose output is being copied."""
    offset: int = 0
    """Bytes of its log that are copied."""
    raw_bytes: int = 0
    """Size of the raw log."""

    @property
    def goes_on(self) -> bool:
        """True until it has ended."""
        return self.state in GOING_ON


class JobFiles:
    """The files of one run. Where a method changes them, it does so under the run's lock."""

    def __init__(self, record: JobRecord) -> None:
        self.record = record
        name = f"{record.job}-{record.run}"
        folder, logs = Path(record.root) / "bazel_cache" / "zephyr_jobs", Path(record.root) / "logs"
        self.status = folder / f"{name}.status"
        self.newest_status = folder / f"{record.job}.status"
        self.events = folder / f"{name}.jsonl"
        self.raw_log = logs / f"{name}.log"
        self.pid = logs / f"{name}.pid"
        self._launch_lock = folder / f".{record.project_id}.{record.job}.lock"

    def begin(self) -> None:
        """Take the place of the run before, then write the record and START."""
        self.status.parent.mkdir(parents=True, exist_ok=True)
        self.raw_log.parent.mkdir(parents=True, exist_ok=True)
        link = self.newest_status.with_name(f".{self.newest_status.name}.{self.record.run}")
        link.symlink_to(self.status.name)
        link.replace(self.newest_status)
        self.record.write()
        with self._locked() as kept:
            self._publish(kept, "START", "start", heartbeat_at=kept.at)
            self.raw_log.touch()

    def read(self) -> Kept:
        """What was last written."""
        values = read_json(self.record.folder / KEPT)
        return Kept(**values) if values else Kept(at=self.record.created_at, heartbeat_at=self.record.created_at)

    def catch_up(self, run_id: str, *, is_running: bool, is_on_node: bool = False) -> Kept:
        """Copy what the command has printed since, and say how far it is.

        `is_running`: the caller attends to it; `is_on_node`: it has begun, where its process cannot be seen from here.
        """
        with self._locked() as kept:
            if kept.run_id != run_id or (is_running and kept.state == "LOST"):
                self._take_over(kept, run_id)
            if kept.goes_on:
                host, now = self.host(kept), time.time()
                has_begun = is_on_node or host is not None
                is_another = host is not None and self._write_pid(host)
                if is_another or (has_begun and kept.msg != "running"):
                    self._publish(kept, "PROGRESS", "running", heartbeat_at=now)
                elif is_running and now - kept.heartbeat_at >= self.record.heartbeat_s:
                    self._publish(kept, "PROGRESS", "running" if has_begun else "waiting", heartbeat_at=now)
            self._copy_output(kept)
            self._repair(kept)
            return kept

    def conclude(self, state: State, rc: int | None = None, msg: str = "") -> Kept:
        """The job has ended; what was concluded before stays."""
        with self._locked() as kept:
            if kept.goes_on:
                self._copy_output(kept)
                self._publish(kept, state, msg or state.lower(), rc=rc, ended_at=time.time())
            self._repair(kept)
            return kept

    def host(self, kept: Kept) -> dict[str, Any] | None:
        """Pid, start, machine and node of the process that runs the newest attempt, or ran it."""
        folder = self.attempt_dir(kept)
        host = read_json(folder / HOST) if folder is not None else None
        return host if host is not None and host["pid"] else None

    def attempt_dir(self, kept: Kept) -> Path | None:
        """Folder of the newest attempt."""
        folder, newest = self.record.folder / kept.run_id / STEP_ID, kept.attempt
        while (folder / f"attempt-{newest + 1}").is_dir():
            newest += 1
        found = folder / f"attempt-{newest}"
        return found if kept.run_id and found.is_dir() else None

    @contextlib.contextmanager
    def launching(self, wait_s: float = 2.0) -> Iterator[bool]:
        """Held while a run of this job is launched; gives False when another process launches one."""
        self._launch_lock.parent.mkdir(parents=True, exist_ok=True)
        with _flock(self._launch_lock, fcntl.LOCK_EX, wait_s) as held:
            yield held

    def is_being_launched(self) -> bool:
        """True while some process launches a run of this job."""
        if not self._launch_lock.exists():
            return False
        with _flock(self._launch_lock, fcntl.LOCK_SH, 0) as held:
            return not held

    @contextlib.contextmanager
    def _locked(self) -> Iterator[Kept]:
        with _flock(self.record.folder / ".lock", fcntl.LOCK_EX, LOCK_TIMEOUT_S) as held:
            if not held:
                raise TimeoutError(f"another process holds `{self.record.folder / '.lock'}` for {LOCK_TIMEOUT_S:g} s")
            yield self.read()

    def _take_over(self, kept: Kept, run_id: str) -> None:
        """A worker runs the job now, for the first time or again after it had ended."""
        self._copy_output(kept)
        if kept.run_id != run_id:
            kept.run_id, kept.attempt, kept.offset = run_id, 1, 0
        if not kept.goes_on:
            self._publish(kept, "START", "start again", rc=None, ended_at=None, heartbeat_at=time.time())
        self._write(kept)

    def _write_pid(self, host: dict[str, Any]) -> bool:
        """Write the pid of a process that is the job's alone; True when it is another than before."""
        text = f"{host['pid']}\n"
        if not host["isolated"] or (self.pid.exists() and self.pid.read_text() == text):
            return False
        write_whole(self.pid, text)
        return True

    def _publish(self, kept: Kept, state: State, msg: str, **changes: Any) -> None:
        vars(kept).update(state=state, msg=msg, at=time.time(), **changes)
        kept.heartbeat_at = kept.heartbeat_at or kept.at
        self._write(kept)
        write_whole(self.status, f"{status_line(self.record.job, kept)}\n")
        append_line(self.events, _event_line(self.record.job, kept))

    def _write(self, kept: Kept) -> None:
        write_whole(self.record.folder / KEPT, json.dumps(asdict(kept)))

    def _repair(self, kept: Kept) -> None:
        """Write what a writer that died has left away."""
        line = f"{status_line(self.record.job, kept)}\n"
        with contextlib.suppress(FileNotFoundError):
            if self.status.read_text() == line and (kept.goes_on or _last_event(self.events) == kept.state.lower()):
                return
        write_whole(self.status, line)
        if _last_event(self.events) != kept.state.lower():
            append_line(self.events, _event_line(self.record.job, kept))

    def _copy_output(self, kept: Kept) -> None:
        """Append to the raw log what the attempts' logs have more; each byte once, also after a crash in here."""
        folder = self.record.folder / kept.run_id / STEP_ID
        if not kept.run_id or not folder.is_dir():
            return
        before = (kept.attempt, kept.offset, kept.raw_bytes)
        with os.fdopen(os.open(self.raw_log, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as raw:
            size = raw.seek(0, os.SEEK_END)
            if size < kept.raw_bytes:
                # Somebody has cut or removed it: make it anew, as far as this run's logs go.
                kept.attempt, kept.offset, kept.raw_bytes = 1, 0, 0
            if size != kept.raw_bytes:
                raw.truncate(kept.raw_bytes)
                raw.seek(kept.raw_bytes)
            while True:
                lines = GrowingLines(folder / f"attempt-{kept.attempt}" / STRUCTURED, kept.offset)
                for line in lines.read():
                    kept.raw_bytes += raw.write(_text_of(line))
                kept.offset = lines.offset
                if not (folder / f"attempt-{kept.attempt + 1}").is_dir():
                    break
                kept.attempt, kept.offset = kept.attempt + 1, 0
        if before != (kept.attempt, kept.offset, kept.raw_bytes):
            self._write(kept)


def status_line(job: str, kept: Kept) -> str:
    """`PROGRESS job=J ts=T msg=running`, `DONE job=J ts=T rc=0` and so on."""
    words = [kept.state, f"job={job}", f"ts={moment(kept.at)}"]
    if kept.state == "PROGRESS":
        words.append(f"msg={kept.msg}")
    elif kept.rc is not None:
        words.append(f"rc={kept.rc}")
    return " ".join(words)


def moment(unix_s: float) -> str:
    """ISO 8601, to the second, in local time with its offset."""
    return datetime.fromtimestamp(unix_s).astimezone().isoformat(timespec="seconds")


def _event_line(job: str, kept: Kept) -> bytes:
    event = {"ts": moment(kept.at), "event": kept.state.lower(), "job": job, "msg": kept.msg}
    return json.dumps(event, ensure_ascii=False).encode(errors="replace")


def _last_event(path: Path) -> str:
    """Kind of the last event of a file; empty when there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 65_536))
        return str(json.loads(file.read().splitlines()[-1])["event"])
    return ""


def _text_of(line: bytes) -> bytes:
    """What a line of the structured log stands for in the raw one."""
    try:
        record = json.loads(line)
        return f"{record['message']}{'' if record['partial'] else chr(10)}".encode(errors="replace")
    except (ValueError, KeyError, TypeError):
        return b""


@contextlib.contextmanager
def _flock(path: Path, how: int, wait_s: float) -> Iterator[bool]:
    """A lock that the kernel lets go of when its holder dies; gives False when somebody else holds it for too long."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(descriptor, how | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    yield False
                    return
                time.sleep(LOCK_POLL_S)
                continue
            break
        yield True
    finally:
        os.close(descriptor)
