"""What a watcher sees: plain lines, the live view on a pseudo-terminal, the summary; nothing steers the terminal."""

import fcntl
import io
import os
import pty
import re
import select
import struct
import termios
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.report import AttemptReport, RunProgress, RunReport, StepReport, StepState
from bridge.summary import summary
from bridge.terminal import columns, cut, duration, safe_json, visible, width_of
from bridge.view import DRAWN_AFTER_S, LiveView, PlainView, Watched, chosen, label, view_for
from steps import Progress

ROWS, COLUMNS = 16, 80
LOCAL_TIME = re.compile(r"^\d\d:\d\d:\d\d ")


class Screen:
    """A pseudo-terminal, and what is on its screen."""

    def __init__(self) -> None:
        self._reader, writer = pty.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.stream: TextIO = os.fdopen(writer, "w", encoding="utf-8")
        self._screen = pyte.Screen(COLUMNS, ROWS)
        self._bytes = pyte.ByteStream(self._screen)

    def lines(self) -> list[str]:
        """The screen's lines that are not empty."""
        self.stream.flush()
        while select.select([self._reader], [], [], 0.05)[0]:
            self._bytes.feed(os.read(self._reader, 65536))
        return [line.rstrip() for line in self._screen.display if line.strip()]

    def close(self) -> None:
        self.stream.close()
        os.close(self._reader)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    """A terminal of 16 lines of 80 cells."""
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = Screen()
    yield screen
    screen.close()


class Run:
    """A run as its workflow tells of it."""

    def __init__(self, total: int = 3) -> None:
        self.watched = Watched()
        self._sequence = 0
        self._total = total
        self._states: dict[str, StepState] = {}

    def progress(self, *steps: StepState, state: Any = "running") -> list[tuple[dict[str, Any] | None, dict[str, Any]]]:
        """Some steps changed."""
        self._sequence += 1
        self._states.update((step.id, step) for step in steps)
        counts: dict[str, int] = {}
        for step in self._states.values():
            counts[step.state] = counts.get(step.state, 0) + 1
        progress = RunProgress(
            workflow_id="flow",
            run_id="run",
            plan="demo",
            state=state,
            started_at=time.time() - 5,
            sequence=self._sequence,
            total=self._total,
            counts=counts,
            log_dir="/logs",
            steps=list(steps),
        )
        return self.watched.update(progress.model_dump(mode="json"))


def running(step_id: str, attempt: int = 1, **progress: Any) -> StepState:
    started_at = time.time() - 3
    return StepState(id=step_id, state="running", attempt=attempt, started_at=started_at, progress=Progress(**progress))


def ended(step_id: str, state: Any = "succeeded", **fields: Any) -> StepState:
    return StepState(**{"id": step_id, "state": state, "attempt": 1, "started_at": 1.0, "duration_s": 2.5, **fields})


def plain_lines(run: Run, *rounds: list[StepState], state: Any = "running") -> list[str]:
    stream = io.StringIO()
    view = PlainView(stream)
    for number, steps in enumerate(rounds):
        is_last = number == len(rounds) - 1
        changes = run.progress(*steps, state=state if is_last else "running")
        view.update(run.watched, changes)
    lines = stream.getvalue().splitlines()
    assert all(LOCAL_TIME.match(line) for line in lines)
    return [line[9:] for line in lines]


def test_plain_lines_tell_each_change_once() -> None:
    fetch = running("fetch")
    lines = plain_lines(
        Run(),
        [fetch],
        [fetch.model_copy(update={"progress": Progress(text="half", fraction=0.5)})],
        [running("fetch", 2)],
        [running("fetch", 3).model_copy(update={"error": "exit code 7"})],
        [ended("fetch", "failed", attempt=2, error="exit code 3\nsecond line", reason="exit_code"), ended("ok")],
        [ended("shard.1", name="count (shard=b)")],
        [ended("none", reason="empty_matrix", attempt=0, started_at=None)],
        [ended("late", "skipped", attempt=0, started_at=None, error="`fetch` failed")],
    )
    assert lines == [
        "fetch running",
        "fetch running attempt 2",
        "fetch running attempt 3 after: exit code 7",
        "fetch failed 2.50s attempt 2: exit code 3",
        "ok succeeded 2.50s",
        "shard.1 (shard=b) succeeded 2.50s",
        "none succeeded: its matrix has no values",
        "late skipped: `fetch` failed",
    ]


def test_plain_lines_tell_once_what_steps_wait_for() -> None:
    text = "waiting for the Ray cluster: no Ray cluster answers at `127.0.0.1:1`"
    waits = [running(step_id, text=text) for step_id in ("a", "b")]
    lines = plain_lines(Run(), [running("a"), running("b")], waits, waits, [ended("a")])
    assert lines == ["a running", "b running", f"a {text}", "a succeeded 2.50s"]


def test_plain_lines_of_a_big_plan_are_failures_retries_and_counts() -> None:
    steps = [ended(f"s{number}") for number in range(998)]
    lines = plain_lines(
        Run(1000), [running("s0"), running("r", 2)], [*steps, ended("bad", "failed", error="no")], state="failed"
    )
    assert lines == ["r running attempt 2", "bad failed 2.50s: no", "1 running, 998 succeeded, 1 failed"]


def test_a_stream_that_is_no_terminal_gets_plain_lines(screen: Screen) -> None:
    assert isinstance(view_for(io.StringIO(), quiet=False), PlainView)
    assert isinstance(view_for(screen.stream, quiet=False), LiveView)


def draw(screen: Screen, run: Run, *steps: StepState) -> LiveView:
    """A live view of the steps."""
    view = LiveView(screen.stream)
    time.sleep(DRAWN_AFTER_S)
    view.update(run.watched, run.progress(*steps))
    return view


def test_the_live_view_has_a_line_for_each_step(screen: Screen) -> None:
    view = draw(
        screen,
        Run(),
        ended("fetch"),
        running("train", 2, node="gpu-1", fraction=0.5, text="epoch 3", last_line="loss 0.1"),
        running("evil\x1b[2J", last_line="\x1b]0;title\x07ok"),
    )
    title, fetch, train, evil = screen.lines()
    assert re.fullmatch(r"demo  [0-9.]+s  2 running, 1 succeeded", title)
    assert re.fullmatch(r"✓ fetch +succeeded +2\.50s", fetch)
    assert re.fullmatch(r"▸ train +running +[0-9.]+s attempt 2  on gpu-1  ━{6}╌{6}  50%  epoch 3  loss…?.*", train)
    assert re.fullmatch(r"▸ evil +running +[0-9.]+s ok", evil)
    view.close()
    assert screen.lines() == []


def test_long_texts_leave_every_column_of_the_live_view(screen: Screen) -> None:
    long_name = "count (shard=/srv/data/experiments/2026/output/shards/3.json)"
    view = draw(
        screen,
        Run(),
        ended("fetch", "failed", error="x" * 200),
        running("count.3", 2).model_copy(update={"name": long_name, "error": "exit code 7"}),
    )
    _, fetch, count = screen.lines()
    assert re.fullmatch(r"✗ fetch +failed +2\.50s x+…", fetch)
    assert re.match(r"▸ count\.3 \(shard=…/3\.json\) running +\S+ attempt 2  again after: exit code", count)
    view.close()


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ("shard=/a/3.json, k=2", "shard=/a/3.json, k=2"),
        ("shard=/srv/data/experiments/output/shards/3.json", "shard=…/3.json"),
        ("word=abcdefghijklmnopqrstuvwxyz, k=2", "word=…defghijklmnopqrstuvwxyz, k=2"),
    ],
)
def test_of_a_long_matrix_value_the_end_is_shown(values: str, shown: str) -> None:
    assert label({"id": "count.3", "name": f"count ({values})"}) == f"count.3 ({shown})"


def test_notes_stay_above_the_live_view(screen: Screen) -> None:
    run = Run()
    view = draw(screen, run, running("fetch"))
    view.note("asking")
    view.update(run.watched, run.progress(ended("fetch")))
    assert [line.split()[0] for line in screen.lines()] == ["asking", "demo", "✓"]
    view.close()
    assert screen.lines() == ["asking"]


def test_a_big_plan_fits_the_screen(screen: Screen) -> None:
    steps = [running(f"r{number}") for number in range(500)] + [ended(f"f{number}", "failed") for number in range(50)]
    view = draw(screen, Run(10_000), *steps)
    lines = screen.lines()
    assert len(lines) < ROWS
    assert "500 running, 50 failed" in lines[0] and "not shown" in lines[0]
    assert {line.split()[0] for line in lines[1:]} == {"✗", "▸"}
    view.close()
    assert screen.lines() == []


def test_a_run_that_ends_at_once_is_not_drawn(screen: Screen) -> None:
    run = Run()
    view = LiveView(screen.stream)
    view.update(run.watched, run.progress(running("fetch")))
    view.update(run.watched, run.progress(ended("fetch"), state="succeeded"))
    view.close()
    assert screen.lines() == []


@given(
    states=st.lists(st.sampled_from(["running", "succeeded", "failed", "skipped"]), max_size=60),
    room=st.integers(1, 40),
    more=st.integers(0, 100),
)
def test_what_is_chosen_fits_and_shows_a_failure(states: list[Any], room: int, more: int) -> None:
    run = Run(len(states) + more)
    run.progress(*[ended(f"s{number}", state) for number, state in enumerate(states)])
    shown = chosen(run.watched, room)
    assert len(shown) <= room
    assert len({step["id"] for step in shown}) == len(shown)
    assert "failed" not in states or any(step["state"] == "failed" for step in shown)


def step(step_id: str, outcome: Any = "succeeded", **fields: Any) -> StepReport:
    attempts = [AttemptReport(number=1, outcome=outcome)]
    return StepReport(
        **{"id": step_id, "outcome": outcome, "attempts": attempts, "started_at": 10.0, "duration_s": 2.5, **fields}
    )


def ending(stream: TextIO, *steps: StepReport, outcome: Any = "failed") -> list[str]:
    report = RunReport(
        workflow_id="flow",
        run_id="run",
        plan="demo",
        outcome=outcome,
        started_at=10.0,
        finished_at=14.0,
        duration_s=4.0,
        log_dir="/logs",
        steps=list(steps),
    )
    return summary(report.model_dump(mode="json"), stream)


def test_the_summary_tells_what_failed_and_why() -> None:
    lines = ending(
        io.StringIO(),
        step("fetch", stdout_tail="not shown"),
        step("soft", "failed", error="exit code 1", allow_failure=True),
        step("train", "failed", error="exit code 3", stderr_tail="a\x1b[31m\nTraceback\n", stderr_truncated=True),
        step("after", "skipped", error="`train` failed", attempts=[], started_at=None),
    )
    assert lines == [
        "",
        "STEP   OUTCOME    DURATION  ATTEMPTS",
        "fetch  succeeded  2.50s     1",
        "soft   failed     2.50s     1         allowed: exit code 1",
        "train  failed     2.50s     1         exit code 3",
        "after  skipped                        `train` failed",
        "",
        "--- train stderr (its end)",
        "a",
        "Traceback",
        "",
        "logs: /logs/flow/run",
        "plan `demo` ✗ failed in 4.00s (1 succeeded, 2 failed, 1 skipped)",
    ]


def test_the_summary_tells_a_long_error_in_full() -> None:
    lines = ending(io.StringIO(), step("a"), step("b", "failed", error="program `x` is not there\n\nhint: install it"))
    assert lines[lines.index("--- b error") + 1 :][:3] == ["program `x` is not there", "", "hint: install it"]


def test_the_summary_ends_with_the_outputs_of_the_last_steps() -> None:
    lines = ending(
        io.StringIO(),
        step("early", outputs={"n": 1}, started_at=1.0),
        step("one", outputs={"picture": "/tmp/p.png"}, started_at=9.0),
        step("two", outputs={"sum": {"a": 1}}, started_at=10.0),
        outcome="succeeded",
    )
    assert 'two.sum: {"a": 1}' in lines and "one.picture: /tmp/p.png" in lines
    assert not any("early.n" in line for line in lines)


def test_the_summary_names_the_folder_of_this_run() -> None:
    cached = step("old", stdout_path="/logs/before/other/old/attempt-1/stdout.log")
    assert "logs: /logs/flow/run" in ending(io.StringIO(), cached)
    own = step("new", stdout_path="/logs/a_b/run/new/attempt-1/stdout.log")
    assert "logs: /logs/a_b/run" in ending(io.StringIO(), cached, own)


def test_the_summary_of_one_step_shows_what_it_printed() -> None:
    lines = ending(io.StringIO(), step("hello", stdout_tail="hello world\n"), outcome="succeeded")
    assert lines[4:6] == ["--- hello stdout", "hello world"]


def test_the_summary_of_a_big_plan_is_its_failures() -> None:
    steps = [step(f"s{number}") for number in range(100)]
    lines = ending(io.StringIO(), *steps, step("bad", "failed"))
    assert [line.split()[0] for line in lines if line.strip()][:2] == ["STEP", "bad"]
    assert not any("s1 " in line for line in lines)


def test_a_table_on_a_terminal_is_cut_to_its_width(screen: Screen) -> None:
    rows = [("succeeded", "x" * 200, "y" * 200), ("failed", "名前" * 40, "z")]
    lines = columns(("STATE", "RUN", "WHY"), rows, screen.stream)
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
    assert all(width_of(line) <= COLUMNS for line in plain)
    assert "\x1b[32msucceeded" in lines[1] and "\x1b[31mfailed" in lines[2]
    assert max(len(line) for line in columns(("A", "B"), [("x" * 500, "y")], io.StringIO())) > 500


@given(st.text())
def test_visible_text_cannot_steer_a_terminal(text: str) -> None:
    shown = visible(text)
    assert all(unicodedata.category(letter) not in ("Cc", "Zl", "Zp") for letter in shown)
    assert not set(shown) & set("\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f")
    assert visible(shown) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b2Jgone", "gone"),
        ("a\rb\x08", "a\\x0db\\x08"),
        ("tab\there", "tab     here"),
        ("grüße 名前", "grüße 名前"),
    ],
)
def test_control_sequences_are_dropped(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(st.text(), st.integers(0, 20))
def test_cut_text_fits(text: str, limit: int) -> None:
    assert width_of(cut(text, limit)) <= limit


def test_json_for_a_terminal_has_no_raw_control_characters() -> None:
    assert safe_json('"grün\x9b2J\x7f"') == '"grün\\u009b2J\\u007f"'


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00s"),
        (9.994, "9.99s"),
        (9.996, "10.0s"),
        (59.96, "1m00s"),
        (61, "1m01s"),
        (3599.7, "1h00m"),
        (7500, "2h05m"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_view_takes_any_order_of_changes() -> None:
    watched = Watched()
    assert watched.sequence == 0 and not watched.ended
    run = Run()
    run.progress(running("a"))
    changes: Callable[..., Any] = run.progress
    assert changes(ended("a"), ended("b"))[0][0]["state"] == "running"
    assert list(run.watched.steps) == ["a", "b"]
