"""One SQLite file shared by every worker and CLI of a user, used as something that may be lost at any time.

Best effort, always: a file that is corrupt, locked for long or read-only is a warning, no rows, and a pause.
"""

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

BUSY_TIMEOUT_S = 2.0
PAUSE_S = 5.0
"""A database that failed is left alone this long: a locked one must not cost every step its timeout."""
log = logging.getLogger(__name__)

# A later format gets tables of another name, so that two releases can share a file.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries_1 (
    plan TEXT NOT NULL, step TEXT NOT NULL, digest TEXT NOT NULL,
    fields TEXT NOT NULL, artifacts TEXT NOT NULL, plan_dir TEXT NOT NULL, result TEXT NOT NULL, changes TEXT NOT NULL,
    stored_at REAL NOT NULL, used_at REAL NOT NULL,
    PRIMARY KEY (plan, step, digest)
);
CREATE INDEX IF NOT EXISTS entries_1_digest ON entries_1 (digest, stored_at);
CREATE INDEX IF NOT EXISTS entries_1_newest ON entries_1 (plan, step, stored_at);
CREATE TABLE IF NOT EXISTS files_1 (path BLOB PRIMARY KEY, stamp TEXT NOT NULL, hash TEXT NOT NULL, stored_at REAL);
"""

Row = tuple[Any, ...]


class CacheDatabase:
    """A connection that opens itself, is shared by threads, and is not carried over a fork."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._pid = 0
        self._inherited: list[sqlite3.Connection] = []
        self._paused_until = 0.0

    def read(self, sql: str, values: Sequence[Any] = ()) -> list[Row]:
        """Rows of a query; none when the database cannot be read."""
        with self._lock:
            if time.monotonic() < self._paused_until:
                return []
            try:
                return self._open().execute(sql, values).fetchall()
            except (sqlite3.Error, OSError, UnicodeError) as error:
                self._warn("read", error)
                return []

    def write(self, statements: Iterable[tuple[str, Sequence[Any]]]) -> int:
        """Run all statements or none; rows changed, -1 when the database cannot be written."""
        with self._lock:
            if time.monotonic() < self._paused_until:
                return -1
            try:
                connection = self._open()
                with connection:
                    connection.execute("BEGIN IMMEDIATE")
                    return sum(connection.execute(sql, values).rowcount for sql, values in statements)
            except (sqlite3.Error, OSError, UnicodeError) as error:
                self._warn("written", error)
                return -1

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock:
            self._close()

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None and self._pid == os.getpid():
            return self._connection
        self._close()
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SQLite gives its side files the mode of the database.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        connection = sqlite3.connect(
            self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, cached_statements=32
        )
        try:
            _use_wal(connection)
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.executescript(_SCHEMA)
        except BaseException:
            connection.close()
            raise
        self._connection, self._pid = connection, os.getpid()
        return connection

    def _close(self) -> None:
        if self._connection is not None and self._pid == os.getpid():
            self._connection.close()
        elif self._connection is not None:
            # Closing the parent's connection in a forked child could take the file from under the parent.
            self._inherited.append(self._connection)
        self._connection = None

    def _warn(self, verb: str, error: Exception) -> None:
        self._close()
        self._paused_until = time.monotonic() + PAUSE_S
        log.warning("the step cache `%s` cannot be %s: %s; hint: it may be removed at any time", self.path, verb, error)


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to a write-ahead log; SQLite does not wait for a lock here when two processes make the file at once."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
