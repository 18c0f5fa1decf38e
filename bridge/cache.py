"""Results of steps by the digest of what they were made from, so that an unchanged step need not run again.

    cache_key.key_fields -> digest -> StepCache.find -> the old StepResult, or run the step and StepCache.store

Best effort, always: a corrupt, locked or read-only database is a warning and a miss, never a failed step. Never a wrong
hit: an entry is one row, written in one transaction after its step succeeded, and counts only while every artifact
still has the hash it had then.
"""

import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bridge.cache_database import CacheDatabase
from bridge.file_hash import FileHasher
from steps import StepError, StepResult
from steps._file_patterns import matching

log = logging.getLogger(__name__)
_USED_AGAIN_S = 86_400.0
"""How stale the time of last use may be, in seconds: hits that write nothing are quick."""
_CANDIDATES = 4
"""Entries of one digest that are tried, newest first: equal steps may have made their artifacts in several places."""
_INSERT = "INSERT OR REPLACE INTO entries_1 VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_FIND = (
    "SELECT artifacts, plan_dir, result, used_at, rowid FROM entries_1 WHERE digest=? ORDER BY stored_at DESC LIMIT ?"
)


class Change(NamedTuple):
    """One reason why a step is not taken from the cache; `before` or `now` is empty where there is no such value."""

    field: str
    before: str
    now: str


class StepCache:
    """The cache in one SQLite file. Safe to share between threads and processes."""

    def __init__(self, path: Path) -> None:
        self._database = CacheDatabase(path)
        self.hasher = FileHasher(self)
        """Remembers hashes of large files in the same file; give it to `key_fields`."""

    def find(self, digest: str, *, plan_dir: str | Path = "") -> StepResult | None:
        """The result stored under `digest`, with the reason `cached`; None when there is none that still holds.

        Relative artifacts are looked for in `plan_dir`, and outputs that are paths in the plan's old folder point into
        it.
        """
        for artifacts, old_dir, result, used_at, row in self._database.read(_FIND, (digest, _CANDIDATES)):
            try:
                found, hashes = StepResult.model_validate_json(result), json.loads(artifacts)
            except ValueError:
                # Written by a release whose results have other fields.
                continue
            if next(self._artifact_changes(hashes, _base(plan_dir, old_dir)), None) is not None:
                continue
            if time.time() - used_at > _USED_AGAIN_S:
                self._database.write([("UPDATE entries_1 SET used_at=? WHERE rowid=?", (time.time(), row))])
            outputs = _moved(found.outputs, old_dir, str(plan_dir))
            return found.model_copy(update={"reason": "cached", "outputs": outputs})
        return None

    def find_many(self, digests: Iterable[str], *, plan_dir: str | Path = "") -> dict[str, StepResult]:
        """The results of those digests that have one, by digest."""
        found = {digest: self.find(digest, plan_dir=plan_dir) for digest in set(digests)}
        return {digest: result for digest, result in found.items() if result is not None}

    def store(
        self,
        plan_name: str,
        step_id: str,
        fields: Mapping[str, str],
        digest: str,
        result: StepResult,
        artifacts: Sequence[str | Path] = (),
        *,
        plan_dir: str | Path = "",
    ) -> bool:
        """Keep the result of a step that succeeded; False when it was not kept.

        Artifacts are files, folders or globs, relative to `plan_dir`. A step that did not make one of them is not kept.
        """
        if result.outcome != "succeeded":
            return False
        hashes = self._artifact_hashes(artifacts, Path(plan_dir))
        if hashes is None:
            return False
        changes = self.explain(plan_name, step_id, fields, plan_dir=plan_dir)
        now = time.time()
        values = (plan_name, step_id, digest, json.dumps(dict(fields)), json.dumps(hashes), str(plan_dir))
        row = (*values, result.model_dump_json(), json.dumps(changes), now, now)
        return self._database.write([(_INSERT, row)]) > 0

    def explain(
        self, plan_name: str, step_id: str, fields: Mapping[str, str], *, plan_dir: str | Path = ""
    ) -> list[Change]:
        """What differs from the newest entry of the step, field by field; empty when nothing does: it would be a hit.

        `(never ran)` when there is no entry, `artifacts.<path>` for a file the step made that is changed or missing.
        """
        newest = (
            "SELECT fields, artifacts, plan_dir FROM entries_1 WHERE plan=? AND step=? ORDER BY stored_at DESC LIMIT 1"
        )
        rows = self._database.read(newest, (plan_name, step_id))
        if not rows:
            return [Change("(never ran)", "", "")]
        before, artifacts, old_dir = rows[0]
        changed = field_changes(json.loads(before), fields)
        return [*changed, *self._artifact_changes(json.loads(artifacts), _base(plan_dir, old_dir))]

    def last_changes(self, plan_name: str, step_id: str) -> list[Change]:
        """Why the step ran when its newest entry was stored: what differed from the one before; empty when unknown."""
        newest = "SELECT changes FROM entries_1 WHERE plan=? AND step=? ORDER BY stored_at DESC LIMIT 1"
        rows = self._database.read(newest, (plan_name, step_id))
        return [Change(*change) for change in json.loads(rows[0][0])] if rows else []

    def prune(self, max_age_s: float) -> int:
        """Forget what nobody has used for `max_age_s` seconds; number of entries."""
        oldest = time.time() - max_age_s
        self._database.write([("DELETE FROM files_1 WHERE stored_at<?", (oldest,))])
        return max(0, self._database.write([("DELETE FROM entries_1 WHERE used_at<?", (oldest,))]))

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def recall(self, path: str, stamp: str) -> str | None:
        """See `HashMemory`."""
        rows = self._database.read("SELECT hash FROM files_1 WHERE path=? AND stamp=?", (os.fsencode(path), stamp))
        return str(rows[0][0]) if rows else None

    def remember(self, path: str, stamp: str, content_hash: str) -> None:
        """See `HashMemory`."""
        row = (os.fsencode(path), stamp, content_hash, time.time())
        self._database.write([("INSERT OR REPLACE INTO files_1 VALUES (?, ?, ?, ?)", row)])

    def _artifact_hashes(self, artifacts: Sequence[str | Path], folder: Path) -> dict[str, str] | None:
        hashes: dict[str, str] = {}
        try:
            for pattern in map(str, artifacts):
                made = {name: self.hasher.hash(path) for name, path in matching(folder, pattern)}
                if not made:
                    raise StepError(f"no file matches the artifact `{pattern}`")
                hashes.update(made)
        except (OSError, StepError) as error:
            log.warning("the step is not cached: %s", error)
            return None
        return hashes

    def _artifact_changes(self, hashes: Mapping[str, str], folder: Path) -> Iterator[Change]:
        for name, before in hashes.items():
            try:
                now = self.hasher.hash(folder / name)
            except OSError:
                now = "(missing)"
            if now != before:
                yield Change(f"artifacts.{name}", before, now)


def field_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[Change]:
    """Fields that came, went or have another value, by name."""
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return [Change(name, before.get(name, ""), now.get(name, "")) for name in names]


def _base(plan_dir: str | Path, old_dir: str) -> Path:
    return Path(str(plan_dir) or old_dir)


def _moved(value: Any, old_dir: str, plan_dir: str) -> Any:
    """The value with paths in the plan's old folder made paths in the folder it is in now."""
    if not old_dir or not plan_dir or old_dir == plan_dir:
        return value
    if isinstance(value, dict):
        return {key: _moved(item, old_dir, plan_dir) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, old_dir, plan_dir) for item in value]
    if isinstance(value, str) and (value == old_dir or value.startswith(old_dir + "/")):
        return plan_dir + value.removeprefix(old_dir)
    return value
