import asyncio
import json
import logging
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.cache import Change, StepCache, field_changes
from bridge.cache_key import digest, key_fields
from bridge.calls import StepCall
from bridge.file_hash import REMEMBERED_FROM_BYTES, FileHasher
from bridge.local_imports import with_local_imports
from bridge.lookup import cache_fields, keep, write_fields
from bridge.plan import Cache
from steps import StepError, StepRequest, StepResult
from steps._file_patterns import matching
from steps._files import attempt_dir

DONE = StepResult(outcome="succeeded", outputs={"rows": 3}, duration_s=1.5)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[StepCache]:
    opened = StepCache(tmp_path / "state" / "cache.db")
    yield opened
    opened.close()


@pytest.fixture
def plan_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "plan"
    folder.mkdir()
    return folder


def request(plan_dir: Path, **changes: Any) -> StepRequest:
    values: dict[str, Any] = {
        "workflow_id": "flow",
        "run_id": "run",
        "step_id": "count",
        "step_name": "Count",
        "attempt": 1,
        "type": "command",
        "params": {"command": "wc", "args": ["-l"]},
        "plan_dir": str(plan_dir),
        "working_dir": str(plan_dir),
        "log_dir": "/var/log",
        "timeout_s": 10,
    }
    return StepRequest(**{**values, **changes})


def fields_of(plan_dir: Path, cache: Cache | None = None, image: str = "", **changes: Any) -> dict[str, str]:
    return key_fields(request(plan_dir, **changes), cache or Cache(), image=image)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# --- the key


def test_fields_are_for_people(plan_dir: Path) -> None:
    write(plan_dir / "data" / "a.csv", "1")
    fields = key_fields(
        request(plan_dir, env={"LEVEL": "3"}, secrets={"TOKEN": "hub"}, expected_outputs=("rows",)),
        Cache(inputs=["data/*.csv", "none/*.csv"], version="2", artifacts=["out.txt"]),
        image="torch",
        image_digest="sha256:1",
        resources={"gpus": 1, "memory": None, "labels": {}},
    )
    assert {name: value for name, value in fields.items() if not value.startswith("sha256:")} == {
        "artifacts": '["out.txt"]',
        "env.LEVEL": '"3"',
        "image": "torch sha256:1",
        "inputs.none/*.csv (no file)": "none",
        "outputs": '["rows"]',
        "params.args": '["-l"]',
        "params.command": '"wc"',
        "python": fields["python"],
        "resources.gpus": "1",
        "secrets.TOKEN": "hub",
        "type": "command",
        "version": "2",
        "working_dir": "<plan>",
    }
    assert set(fields) >= {"code.steps.command", "inputs.data/a.csv"}


def test_what_does_not_change_a_result_is_not_in_the_key(plan_dir: Path) -> None:
    other = fields_of(
        plan_dir, workflow_id="w", run_id="r", attempt=7, timeout_s=99, grace_s=1, log_dir="/l", step_name="n"
    )
    assert other == fields_of(plan_dir)


Mutate = Callable[[Path], dict[str, str]]
INPUTS = Cache(inputs=["data"])
PYTHON: dict[str, Any] = {"type": "python", "params": {"call": "tools:count"}}


@pytest.mark.parametrize(
    ("field", "mutate"),
    [
        ("params.args", lambda folder: fields_of(folder, params={"command": "wc", "args": ["-c"]})),
        ("env.LEVEL", lambda folder: fields_of(folder, env={"LEVEL": "4"})),
        ("secrets.TOKEN", lambda folder: fields_of(folder, secrets={"TOKEN": "other"})),
        ("image", lambda folder: fields_of(folder, image="torch")),
        ("version", lambda folder: fields_of(folder, Cache(version="2"))),
        ("outputs", lambda folder: fields_of(folder, expected_outputs=("a",))),
        ("working_dir", lambda folder: fields_of(folder, working_dir="/tmp")),
        ("artifacts", lambda folder: fields_of(folder, Cache(artifacts=["a"]))),
    ],
)
def test_each_part_changes_exactly_its_field(plan_dir: Path, field: str, mutate: Mutate) -> None:
    before, after = fields_of(plan_dir), mutate(plan_dir)
    assert [change.field for change in field_changes(before, after) if change.field != "plan_dir"] == [field]
    assert digest(before) != digest(after)


def test_input_files_changed_added_and_removed(plan_dir: Path) -> None:
    kept, changed = write(plan_dir / "data/kept", "1"), write(plan_dir / "data/deep/changed", "1")
    removed = write(plan_dir / "data/removed", "1")
    before = fields_of(plan_dir, INPUTS)
    os.utime(kept, (1, 1))
    assert fields_of(plan_dir, INPUTS) == before, "times are no content"
    changed.write_text("2")
    removed.unlink()
    write(plan_dir / "data/added", "1")
    changes = field_changes(before, fields_of(plan_dir, INPUTS))
    assert [(change.field, bool(change.before), bool(change.now)) for change in changes] == [
        ("inputs.data/added", False, True),
        ("inputs.data/deep/changed", True, True),
        ("inputs.data/removed", True, False),
    ]


def test_code_of_a_python_step_with_what_it_imports(plan_dir: Path) -> None:
    write(plan_dir / "tools.py", "import json, helper\nfrom pack import part\n")
    helper = write(plan_dir / "helper.py", "")
    part = write(plan_dir / "pack/part.py", "from . import sibling\nfrom .. import helper\n")
    write(plan_dir / "pack/__init__.py", "")
    sibling = write(plan_dir / "pack/sibling.py", "import tools")
    write(plan_dir / "unused.py", "")
    before = fields_of(plan_dir, **PYTHON)
    code = {name for name in before if name.startswith("code.")}
    assert code == {
        "code.steps.python",
        *(f"code.{name}" for name in ("tools.py", "helper.py", "pack/__init__.py", "pack/part.py", "pack/sibling.py")),
    }
    for path in (helper, part, sibling):
        path.write_text(path.read_text() + "# changed\n")
        after = fields_of(plan_dir, **PYTHON)
        assert [change.field for change in field_changes(before, after)] == [
            f"code.{path.relative_to(plan_dir).as_posix()}"
        ]
        before = after


def test_scripts_of_a_command_step(plan_dir: Path) -> None:
    program = write(plan_dir / "bin" / "run", "#!/bin/sh")
    script = write(plan_dir / "tools" / "count.py", "import shared")
    shared = write(plan_dir / "tools" / "shared.py", "")
    write(plan_dir / "data.csv", "1")

    def fields() -> dict[str, str]:
        arguments = ["tools/count.py", "data.csv", "none.sh", "../outside.py", "x" * 300 + ".py", "\0.py"]
        return fields_of(plan_dir, params={"command": "./bin/run", "args": arguments})

    before = fields()
    for path in (program, script, shared):
        path.write_text(path.read_text() + "\n")
        after = fields()
        assert [change.field for change in field_changes(before, after)] == [
            f"code.{path.relative_to(plan_dir).as_posix()}"
        ]
        before = after
    deeper = fields_of(
        plan_dir, working_dir=str(plan_dir / "tools"), params={"command": "python", "args": ["count.py"]}
    )
    assert {"code.tools/count.py", "code.tools/shared.py"} <= set(deeper)


def test_same_command_in_two_projects_is_not_the_same(tmp_path: Path) -> None:
    one, other = fields_of(tmp_path / "one"), fields_of(tmp_path / "other")
    assert [change.field for change in field_changes(one, other)] == ["plan_dir"]
    artifact = Cache(artifacts=["out.txt"])
    assert fields_of(tmp_path / "one", artifact) == fields_of(tmp_path / "other", artifact), "its hash decides"


def test_local_imports_of_a_broken_module(plan_dir: Path) -> None:
    broken = write(plan_dir / "broken.py", "import (")
    assert with_local_imports([broken], plan_dir) == [broken]


def test_a_moved_plan_has_the_same_key(tmp_path: Path) -> None:
    def fields(folder: Path) -> dict[str, str]:
        write(folder / "data" / "a.csv", "1")
        write(folder / "tools.py", "")
        return fields_of(
            folder,
            Cache(inputs=["data/*.csv"]),
            type="python",
            params={"call": "tools:count", "arguments": {"path": str(folder / "data/a.csv"), "all": [str(folder)]}},
            env={"DATA": str(folder / "data")},
            working_dir=str(folder / "data"),
        )

    assert fields(tmp_path / "here") == fields(tmp_path / "somewhere" / "else")


def test_values_that_look_alike_are_different(plan_dir: Path) -> None:
    values: list[Any] = [1, "1", 1.0, True, "true", None, "", [], {}, {"a": None}, {"a": {}}, {"a": "b"}, {"a.b": 1}]
    values += [{"a": {"b": 1}}, ["1"], "x" * 200, "x" * 201]
    digests = [
        digest(fields_of(plan_dir, type="python", params={"call": "json:dumps", "arguments": {"obj": value}}))
        for value in values
    ]
    assert len(set(digests)) == len(values)


@given(st.dictionaries(st.text(), st.text(), max_size=5), st.dictionaries(st.text(), st.text(), max_size=5))
def test_digest_is_equal_for_equal_fields_only(one: dict[str, str], other: dict[str, str]) -> None:
    assert (digest(one) == digest(other)) == (one == other)
    assert digest(one) == digest(dict(reversed(one.items())))


def test_bad_params_and_unknown_types_are_step_errors(plan_dir: Path) -> None:
    with pytest.raises(StepError, match="params that `python` refuses"):
        fields_of(plan_dir, type="python", params={"cal": 1})
    with pytest.raises(StepError, match="unknown step type"):
        fields_of(plan_dir, type="comand")


# --- files


def test_patterns(plan_dir: Path) -> None:
    for name in ("a.csv", "b.txt", "deep/c.csv", "deep/er/d.csv", "odd[1].csv", ".hidden"):
        write(plan_dir / name, name)
    names = {pattern: [name for name, _ in matching(plan_dir, pattern)] for pattern in ("*.csv", "**/*.csv", "deep/**")}
    assert names["*.csv"] == ["a.csv", "odd[1].csv"]
    assert names["**/*.csv"] == ["a.csv", "deep/c.csv", "deep/er/d.csv", "odd[1].csv"]
    assert names["deep/**"] == ["deep/c.csv", "deep/er/d.csv"]
    assert [name for name, _ in matching(plan_dir, "odd[1].csv")] == ["odd[1].csv"]
    assert [name for name, _ in matching(plan_dir, ".")] == sorted(
        ["a.csv", "b.txt", "deep/c.csv", "deep/er/d.csv", "odd[1].csv", ".hidden"]
    )
    assert [name for name, _ in matching(plan_dir / "deep", str(plan_dir / "*.txt"))] == [str(plan_dir / "b.txt")]
    assert matching(plan_dir, "none/*") == matching(plan_dir, "none") == []


def test_links_are_followed_once_and_pipes_are_no_files(plan_dir: Path) -> None:
    target = write(plan_dir / "target", "1")
    folder = plan_dir / "data"
    folder.mkdir()
    (folder / "link").symlink_to(target)
    (folder / "loop").symlink_to(folder)
    (folder / "broken").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    assert [name for name, _ in matching(plan_dir, "data")] == ["data/link"]
    before = fields_of(plan_dir, INPUTS)
    target.write_text("2")
    assert fields_of(plan_dir, INPUTS)["inputs.data/link"] != before["inputs.data/link"]


def test_many_files_share_a_field_and_too_many_are_refused(plan_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.cache_key.LISTED_FILES", 3)
    monkeypatch.setattr("steps._file_patterns.MAX_FILES", 5)
    for number in range(4):
        write(plan_dir / "data" / str(number), "1")
    before = fields_of(plan_dir, INPUTS)
    assert before["inputs.data"].startswith("4 files sha256:")
    write(plan_dir / "data" / "0", "2")
    assert [change.field for change in field_changes(before, fields_of(plan_dir, INPUTS))] == ["inputs.data"]
    for number in range(4, 6):
        write(plan_dir / "data" / str(number), "1")
    with pytest.raises(StepError, match=r"`data` in .* names more than 5 files"):
        fields_of(plan_dir, INPUTS)


class Memory:
    """Remembers in a dictionary and counts."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], str] = {}
        self.hits = 0

    def recall(self, path: str, stamp: str) -> str | None:
        self.hits += (path, stamp) in self.known
        return self.known.get((path, stamp))

    def remember(self, path: str, stamp: str, content_hash: str) -> None:
        self.known[path, stamp] = content_hash


def test_large_unchanged_file_is_not_read_again(tmp_path: Path, cache: StepCache) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"x" * REMEMBERED_FROM_BYTES)
    memory = Memory()
    hasher = FileHasher(memory)
    first = hasher.hash(path)
    assert not memory.known, "a file that was changed a moment ago may change again within its clock's tick"
    # The change time cannot be set back, so wait until the file has settled.
    deadline = time.monotonic() + 30
    while not memory.known and time.monotonic() < deadline:
        time.sleep(0.1)
        assert hasher.hash(path) == first
    assert hasher.hash(path) == first
    assert memory.hits == 1
    status = path.stat()
    path.write_bytes(b"y" * REMEMBERED_FROM_BYTES)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert hasher.hash(path) != first, "same size, inode and modification time, other content"

    cache.remember(str(path), "stamp", first)
    assert cache.recall(str(path), "stamp") == first
    assert cache.recall(str(path), "other") is None


# --- the cache


def test_find_what_was_stored(cache: StepCache) -> None:
    assert cache.find("d") is None
    assert cache.store("plan", "count", {"a": "1"}, "d", DONE)
    assert cache.find("d") == DONE.model_copy(update={"reason": "cached"})
    assert cache.find_many(["d", "e"]) == {"d": cache.find("d")}


@pytest.mark.parametrize("outcome", ["failed", "cancelled", "timed_out", "skipped", "not_run"])
def test_only_success_is_kept(cache: StepCache, outcome: Any) -> None:
    assert not cache.store("plan", "count", {}, "d", StepResult(outcome=outcome))
    assert cache.find("d") is None


def test_a_result_is_kept_under_what_was_written_down_before_it_was_made(
    cache: StepCache, plan_dir: Path, tmp_path: Path
) -> None:
    data = write(plan_dir / "data", "1")
    call = StepCall(request=request(plan_dir, log_dir=str(tmp_path / "logs")), plan="plan", cache=INPUTS)
    before = cache_fields(call, cache)
    keep(call, DONE, cache)
    assert cache.find(digest(before)) is None, "nobody has written anything down"
    folder = attempt_dir(call.request)
    write_fields(folder, before)
    data.write_text("2")
    now = cache_fields(call, cache)
    write_fields(folder, now)
    keep(call, DONE, cache)
    assert cache.find(digest(before)) is not None
    assert cache.find(digest(now)) is None
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600]


def test_artifact_must_still_be_what_it_was(cache: StepCache, plan_dir: Path) -> None:
    made = write(plan_dir / "out/a.txt", "made")
    write(plan_dir / "out/b.txt", "made")
    assert cache.store("plan", "count", {"f": "1"}, "d", DONE, ["out"], plan_dir=plan_dir)
    assert cache.find("d", plan_dir=plan_dir) is not None
    assert cache.explain("plan", "count", {"f": "1"}, plan_dir=plan_dir) == []
    made.write_text("ma")
    assert cache.find("d", plan_dir=plan_dir) is None
    [change] = cache.explain("plan", "count", {"f": "1"}, plan_dir=plan_dir)
    assert change.field == "artifacts.out/a.txt" and change.now.startswith("sha256:") and change.now != change.before
    made.unlink()
    assert cache.find("d") is None, "the folder it was stored with is the default"
    [change] = cache.explain("plan", "count", {"f": "1"}, plan_dir=plan_dir)
    assert (change.field, change.now) == ("artifacts.out/a.txt", "(missing)")


def test_absolute_artifacts(cache: StepCache, tmp_path: Path) -> None:
    made = write(tmp_path / "made", "1")
    assert cache.store("plan", "count", {}, "d", DONE, [made])
    assert cache.find("d") is not None
    made.unlink()
    assert cache.find("d") is None


def test_step_that_did_not_make_its_artifact_is_not_kept(
    cache: StepCache, plan_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(plan_dir / "a", "")
    assert not cache.store("plan", "count", {}, "d", DONE, ["a", "b*"], plan_dir=plan_dir)
    assert cache.find("d") is None
    assert "no file matches the artifact `b*`" in caplog.text


def test_moved_plan_finds_its_artifacts_and_gets_outputs_in_its_folder(cache: StepCache, plan_dir: Path) -> None:
    write(plan_dir / "out.txt", "made")
    outputs = {"path": str(plan_dir / "out.txt"), "all": [str(plan_dir)], "text": f"see {plan_dir}", "rows": 3}
    cache.store("p", "s", {}, "d", DONE.model_copy(update={"outputs": outputs}), ["out.txt"], plan_dir=plan_dir)
    moved = plan_dir.rename(plan_dir.with_name("moved"))
    assert cache.find("d") is None
    found = cache.find("d", plan_dir=moved)
    assert found is not None
    assert found.outputs == {**outputs, "path": str(moved / "out.txt"), "all": [str(moved)]}


def test_explain(cache: StepCache) -> None:
    assert cache.explain("plan", "count", {"a": "1"}) == [Change("(never ran)", "", "")]
    cache.store("plan", "count", {"a": "1", "b": "2"}, "d1", DONE)
    assert cache.explain("plan", "count", {"a": "9", "c": "3"}) == [
        Change("a", "1", "9"),
        Change("b", "2", ""),
        Change("c", "", "3"),
    ]
    assert cache.explain("plan", "other", {}) == [Change("(never ran)", "", "")]
    cache.store("plan", "count", {"a": "9", "b": "2"}, "d2", DONE)
    assert cache.explain("plan", "count", {"a": "9", "b": "2"}) == []
    assert cache.last_changes("plan", "count") == [Change("a", "1", "9")]
    assert cache.find("d1") is not None, "going back to the old value is a hit"


def test_prune_keeps_what_is_used(cache: StepCache, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr("bridge.cache.time.time", lambda: now - 10 * 86_400)
    cache.store("plan", "old", {}, "d1", DONE)
    cache.store("plan", "used", {}, "d2", DONE)
    monkeypatch.undo()
    assert cache.find("d2") is not None
    assert cache.prune(5 * 86_400) == 1
    assert cache.find("d1") is None
    assert cache.find("d2") is not None


def test_result_of_another_release_is_a_miss(cache: StepCache, tmp_path: Path) -> None:
    cache.store("plan", "count", {}, "d", DONE)
    with sqlite3.connect(tmp_path / "state" / "cache.db") as connection:
        result = json.dumps({**DONE.model_dump(), "unheard_of": 1})
        connection.execute("UPDATE entries_1 SET result=?", (result,))
    connection.close()
    assert cache.find("d") is None


def test_corrupt_database_is_a_warning_and_a_miss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cache.db"
    path.write_bytes(b"this is no database at all" * 1000)
    broken = StepCache(path)
    assert broken.find("d") is None
    assert not broken.store("plan", "count", {}, "d", DONE)
    assert broken.explain("plan", "count", {}) == [Change("(never ran)", "", "")]
    assert broken.prune(0) == 0
    broken.close()
    assert [record.levelno for record in caplog.records] == [logging.WARNING], "one warning, then a pause"
    assert f"`{path}` cannot be read" in caplog.text


def test_folder_that_cannot_be_made_is_a_miss(tmp_path: Path) -> None:
    write(tmp_path / "file", "")
    broken = StepCache(tmp_path / "file" / "cache.db")
    assert broken.find("d") is None
    assert not broken.store("plan", "count", {}, "d", DONE)


def test_locked_database_is_a_miss(
    cache: StepCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.store("plan", "count", {}, "d", DONE)
    cache.close()
    monkeypatch.setattr("bridge.cache_database.BUSY_TIMEOUT_S", 0.05)
    holder = sqlite3.connect(tmp_path / "state" / "cache.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    assert cache.find("d") is not None, "readers do not wait for a writer"
    assert not cache.store("plan", "count", {}, "e", DONE)
    assert "locked" in caplog.text
    holder.execute("ROLLBACK")
    holder.close()


def test_file_is_private(cache: StepCache, tmp_path: Path) -> None:
    cache.store("plan", "count", {}, "d", DONE)
    files = list((tmp_path / "state").iterdir())
    assert len(files) >= 1
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


STORE_MANY = """
import sys
from pathlib import Path
from bridge.cache import StepCache
from steps import StepResult
cache = StepCache(Path(sys.argv[1]))
done = StepResult(outcome="succeeded")
stored = [cache.store("plan", sys.argv[2], {}, f"{sys.argv[2]}-{index}", done) for index in range(50)]
cache.close()
sys.exit(not all(stored))
"""


def test_many_processes_share_one_file(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    argv = [sys.executable, "-c", STORE_MANY, str(path)]
    processes = [subprocess.Popen([*argv, str(number)]) for number in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    cache = StepCache(path)
    assert len(cache.find_many(f"{number}-{index}" for number in range(3) for index in range(50))) == 150
    cache.close()


async def test_threads_share_one_cache(cache: StepCache) -> None:
    async def use(number: int) -> StepResult | None:
        await asyncio.to_thread(cache.store, "plan", f"step-{number}", {}, str(number), DONE)
        return await asyncio.to_thread(cache.find, str(number))

    assert None not in await asyncio.gather(*(use(number) for number in range(50)))


def test_two_hundred_steps_are_looked_up_at_once(cache: StepCache, plan_dir: Path) -> None:
    write(plan_dir / "in.csv", "1,2,3\n")
    asked = Cache(inputs=["in.csv"])
    requests = [request(plan_dir, step_id=f"s{n}", params={"command": "echo", "args": [str(n)]}) for n in range(200)]
    for each in requests:
        fields = key_fields(each, asked, image="", hasher=cache.hasher)
        assert cache.store("plan", each.step_id, fields, digest(fields), DONE, ["in.csv"], plan_dir=plan_dir)
    digests = [digest(key_fields(each, asked, image="", hasher=cache.hasher)) for each in requests]
    assert len(set(digests)) == len(cache.find_many(digests, plan_dir=plan_dir)) == 200
