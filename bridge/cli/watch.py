"""Watching a run to its end: progress -> view, Ctrl-C -> cancel, a second one -> let go; then the report.

    submit | attach | retry -> watch: progress (long poll) -> View.update -> ... -> report -> summary, exit code

A lost connection is repaired inside `Connection.call`; the run itself does not notice a watcher that goes away.
"""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from bridge.cli.connection import CallError, Connection
from bridge.cli.failure import FAILED, INTERRUPTED
from bridge.summary import summary
from bridge.terminal import safe_json, visible
from bridge.view import View, Watched, view_for

WAIT_S = 0.5
"""Longest time between two looks at a run: times go on in the live view."""

EXIT_CODES = {"succeeded": 0, "cancelled": INTERRUPTED}
"""Exit code of each outcome; every other one is `FAILED`."""


@dataclass(frozen=True)
class Output:
    """What the user wants to see, and where."""

    as_json: bool = False
    """The report as one JSON document on stdout; everything else goes to stderr."""
    quiet: bool = False
    """Nothing but a failed run's summary."""

    def print_json(self, document: Any) -> None:
        """One JSON document on stdout."""
        print(safe_json(json.dumps(document, indent=2, ensure_ascii=False)))

    def view(self) -> View:
        """The view of this output."""
        return view_for(sys.stderr if self.as_json else sys.stdout, self.quiet)

    def conclude(self, report: dict[str, Any]) -> int:
        """Print the end of a run; its exit code."""
        code = EXIT_CODES.get(report["outcome"], FAILED)
        if self.as_json:
            self.print_json(report)
        elif not self.quiet or code:
            stream = sys.stderr if self.quiet else sys.stdout
            print("\n".join(summary(report, stream)), file=stream)
        return code


class Interrupted(KeyboardInterrupt):
    """Ctrl-C was pressed while we waited."""


class Interrupts:
    """Ctrl-C, delivered only while a connection waits, so that nothing is left half done."""

    def __init__(self) -> None:
        self._pending = 0
        self._waiting = False

    @contextmanager
    def installed(self, connection: Connection) -> Iterator[None]:
        """Interrupt the waits of `connection` in this block; let SIGTERM and SIGHUP leave it in good order."""
        handlers = {signal.SIGINT: self._handle, signal.SIGTERM: _leave, signal.SIGHUP: _leave}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        waited, connection.waiting = connection.waiting, self._while_waiting
        try:
            yield
        finally:
            connection.waiting = waited
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def _while_waiting(self) -> Iterator[None]:
        """Raise `Interrupted` in this block, at once when Ctrl-C was pressed before it."""
        self._waiting = True
        try:
            if self._pending:
                self._raise()
            yield
        finally:
            self._waiting = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self._pending += 1
        if self._waiting:
            self._raise()

    def _raise(self) -> None:
        self._waiting = False
        self._pending -= 1
        raise Interrupted


def _leave(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def watch(connection: Connection, workflow_id: str, run_id: str, output: Output) -> int:
    """Show a run until it ends or the user lets go of it; the exit code."""
    interrupts, num_interrupts, cancel_wanted = Interrupts(), 0, False
    watched, view = Watched(), output.view()
    with interrupts.installed(connection):
        try:
            while not watched.ended:
                try:
                    if cancel_wanted:
                        cancel(connection, workflow_id, run_id)
                        cancel_wanted = False
                    progress = connection.call(
                        "progress", workflow_id=workflow_id, run_id=run_id, since=watched.sequence, wait_s=WAIT_S
                    )
                except Interrupted:
                    num_interrupts += 1
                    if num_interrupts > 1:
                        break
                    cancel_wanted = True
                    view.note("asking the run to cancel; Ctrl-C again lets go of it")
                    continue
                view.update(watched, watched.update(progress))
        finally:
            view.close()
    if not watched.ended:
        doing = "the run goes on" if cancel_wanted else "the run is being cancelled"
        view.note(f"{doing}; pick it up with: orchestrate attach {visible(workflow_id)}")
        return INTERRUPTED
    return output.conclude(connection.call("report", workflow_id=workflow_id, run_id=run_id))


def cancel(connection: Connection, workflow_id: str, run_id: str) -> None:
    """Ask a run to cancel; one that has just ended is left alone."""
    try:
        connection.call("cancel", workflow_id=workflow_id, run_id=run_id)
    except CallError as error:
        if error.kind not in ("RunNotFound", "RunConflict"):
            raise
