import json
import os
import pty
import stat
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from bridge.cli.secret import COMMANDS, MAX_VALUE_BYTES
from bridge.payload_keys import read_keys
from steps._secrets import resolve_secrets

GROUP = click.Group(commands={command.name or "": command for command in COMMANDS})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("ORCHESTRATE_HOME", str(folder))
    monkeypatch.setenv("ORCHESTRATE_SECRETS_DIR", str(folder / "secrets"))
    return folder


def run(*arguments: str, value: str | bytes = "") -> Result:
    return CliRunner().invoke(GROUP, arguments, input=value)


def test_set_from_stdin_is_found_by_a_step(home: Path) -> None:
    result = run("secret", "set", "HF_TOKEN", value="hunter2\n")
    assert result.exit_code == 0 and "hunter2" not in result.output
    assert resolve_secrets(["HF_TOKEN"], "flow") == {"HF_TOKEN": "hunter2"}
    assert stat.S_IMODE((home / "secrets").stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "secrets" / "HF_TOKEN").stat().st_mode) == 0o600
    run("secret", "set", "HF_TOKEN", value="other")
    assert resolve_secrets(["HF_TOKEN"], "flow") == {"HF_TOKEN": "other"}
    assert len(list((home / "secrets").iterdir())) == 1


def test_list_and_remove(home: Path) -> None:
    assert run("secret", "list").output == ""
    for name in ("b.key-1", "_a"):
        run("secret", "set", name, value="hunter2")
    (home / "secrets" / "runs" / "flow").mkdir(parents=True)
    assert run("secret", "list").output == "_a\nb.key-1\n"
    assert json.loads(run("secret", "list", "--json").output) == ["_a", "b.key-1"]
    assert run("secret", "remove", "_a").exit_code == 0
    assert run("secret", "list").output == "b.key-1\n"
    again = run("secret", "remove", "_a")
    assert again.exit_code == 2 and "there is no secret `_a`" in again.output


@pytest.mark.parametrize("name", ["1a", "../a", "a/b", "A=hunter2", "", ".a", "a b", "a\n"])
def test_bad_names_are_refused(home: Path, name: str) -> None:
    for verb in ("set", "remove"):
        result = run("secret", verb, name, value="x")
        assert result.exit_code == 2 and "secret name is" in result.output
    assert not (home / "secrets").exists()


def test_name_of_the_folder_of_runs_is_refused(home: Path) -> None:
    (home / "secrets" / "runs").mkdir(parents=True)
    assert run("secret", "set", "runs", value="x").exit_code == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "empty"),
        ("\n", "empty"),
        ("a\0b", "zero byte"),
        (b"\xff", "not UTF-8"),
        ("x" * (MAX_VALUE_BYTES + 1), "larger"),
    ],
)
def test_values_no_environment_can_hold_are_refused(home: Path, value: str | bytes, message: str) -> None:
    result = run("secret", "set", "A", value=value)
    assert result.exit_code == 2 and message in result.output
    assert not (home / "secrets" / "A").exists()


def test_value_is_no_argument(home: Path) -> None:
    assert run("secret", "set", "A", "hunter2").exit_code == 2


def test_prompt_hides_what_is_typed(home: Path) -> None:
    program = "from bridge.cli.secret import secret; secret(['set', 'A'])"
    master, slave = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)
        seen = b""
        for prompt in (b"Value of A: ", b"confirmation: "):
            while prompt not in seen.rpartition(b"\n")[2]:
                seen += os.read(master, 1000)
            os.write(master, b"hunter2\n")
        assert process.wait(60) == 0
    finally:
        os.close(master)
    assert b"hunter2" not in seen
    assert (home / "secrets" / "A").read_text() == "hunter2"


def test_new_key_and_rotation(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    assert run("key", "new", str(file), "--id", "one").exit_code == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    first = read_keys(file)
    result = run("key", "new", str(file), "--id", "two")
    assert result.exit_code == 0
    assert list(read_keys(file)) == ["two", "one"]
    assert read_keys(file)["one"] == first["one"]
    assert file.read_text().partition(":")[2].strip()[:20] not in result.output
    assert run("key", "new", str(file)).exit_code == 0
    assert len(read_keys(file)) == 3


def test_new_key_refuses_what_it_cannot_keep(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    run("key", "new", str(file), "--id", "one")
    assert "already has a key `one`" in run("key", "new", str(file), "--id", "one").output
    assert "wanted up to 64" in run("key", "new", str(file), "--id", "a:b").output
    file.chmod(0o644)
    assert "wanted 0600" in run("key", "new", str(file)).output
    assert list(read_keys_loosely(file)) == ["one"]
    assert run("key", "new", str(tmp_path / "none" / "keys")).exit_code == 2


def read_keys_loosely(file: Path) -> dict[str, bytes]:
    file.chmod(0o600)
    return read_keys(file)


def test_commands_do_not_import_temporal() -> None:
    program = "import sys, bridge.cli.secret; sys.exit(bool({'temporalio', 'cryptography', 'ray'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
