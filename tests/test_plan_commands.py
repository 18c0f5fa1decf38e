"""`validate`, `graph`, `schema` and `steps` as they are typed."""

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from bridge.cli.plan import COMMANDS

PLANS = Path(__file__).parent / "plans"


def orchestrate(*words: str | Path) -> Result:
    group = click.Group(commands={str(command.name): command for command in COMMANDS})
    return CliRunner().invoke(group, [str(word) for word in words])


@pytest.fixture
def asking(tmp_path: Path) -> Path:
    path = tmp_path / "asking.yaml"
    path.write_text("params: {n: {type: integer}}\nsteps: [{id: a, type: command, command: ls}]\n")
    return path


def test_validate_a_valid_plan() -> None:
    result = orchestrate("validate", PLANS / "features.yaml")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{PLANS / 'features.yaml'}: valid, 4 steps\n", "")


def test_validate_prints_every_problem_to_stderr_and_ends_with_2(tmp_path: Path) -> None:
    result = orchestrate("validate", PLANS / "features.yaml", PLANS / "broken.yaml", tmp_path / "none.yaml")
    assert result.exit_code == 2
    assert result.stdout.count("\n") == 1
    assert f"{PLANS / 'broken.yaml'}:2:1: error: unknown key `log_dri`\n  hint: did you mean" in result.stderr
    assert f"{PLANS / 'broken.yaml'}: 33 errors" in result.stderr
    assert "none.yaml: error: cannot read the plan" in result.stderr


def test_validate_as_json(asking: Path) -> None:
    result = orchestrate("validate", "--json", PLANS / "broken.yaml")
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert found["valid"] is False and len(found["problems"]) == 33
    assert found["problems"][0] == {
        "severity": "error",
        "file": str(PLANS / "broken.yaml"),
        "line": 2,
        "column": 1,
        "path": "log_dri",
        "message": "unknown key `log_dri`",
        "hint": "did you mean `log_dir`?",
    }
    many = json.loads(orchestrate("validate", "--json", asking, asking).stdout)
    assert [one["valid"] for one in many] == [True, True]


def test_validate_with_params(asking: Path) -> None:
    assert orchestrate("validate", asking).exit_code == 0
    assert orchestrate("validate", asking, "-p", "n=3").exit_code == 0
    result = orchestrate("validate", asking, "-p", "n=three", "-p", "m=1")
    assert result.exit_code == 2
    assert f"{asking}: error: param `n`: got `three`, wanted a whole number" in result.stderr
    assert "unknown param `m`" in result.stderr
    assert orchestrate("validate", asking, "-p", "n").exit_code == 2


def test_a_warning_is_shown_and_does_not_fail(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("steps: [{id: a, type: command, command: ls, env: {HF_TOKEN: abc}}]")
    result = orchestrate("validate", path)
    assert result.exit_code == 0 and ": warning: `HF_TOKEN` looks like a secret" in result.stderr


def test_graph() -> None:
    assert orchestrate("graph", PLANS / "features.yaml").stdout.startswith("flowchart LR\n")
    assert orchestrate("graph", PLANS / "features.yaml", "--format", "dot").stdout.startswith('digraph "features"')
    result = orchestrate("graph", PLANS / "broken.yaml")
    assert (result.exit_code, result.stdout) == (2, "") and "unknown key" in result.stderr


def test_schema(tmp_path: Path) -> None:
    printed = orchestrate("schema").stdout
    assert json.loads(printed)["title"] == "Plan"
    path = tmp_path / "plan.schema.json"
    assert orchestrate("schema", "--output", path).exit_code == 0
    assert path.read_text() == printed and list(tmp_path.iterdir()) == [path]
    assert orchestrate("schema", "--output", tmp_path / "no" / "x.json").exit_code == 2


def test_steps() -> None:
    listed = orchestrate("steps").stdout
    assert "download" in listed and "fields: url*, output*" in listed
    one = orchestrate("steps", "download").stdout
    assert "in a block `download:`" in one and "sha256" in one and 'default ""' in one
    described = {entry["name"]: entry for entry in json.loads(orchestrate("steps", "--json").stdout)}
    assert described["command"]["inline"] is True and described["download"]["outputs"]
    args = next(field for field in described["command"]["fields"] if field["name"] == "args")
    assert args == {
        "name": "args",
        "type": "list of text",
        "required": False,
        "default": [],
        "description": "Arguments, passed as they are.",
    }
    result = orchestrate("steps", "downlaod")
    assert result.exit_code == 2 and "did you mean `download`?" in result.stderr
