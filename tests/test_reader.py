"""Plan files: YAML 1.2 and nothing dangerous, old plans unchanged, and every problem with its line and column."""

import json
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.document import core_value, read_document
from bridge.expressions import render
from bridge.plan import Plan
from bridge.problems import PlanError, Problem
from bridge.reader import read_any, read_plan, read_plan_text, read_steps_json

PLANS = Path(__file__).parent / "plans"
EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.yaml"))
STEP = "steps: [{id: a, type: command, command: ls}]\n"


def problems(text: str) -> list[Problem]:
    try:
        return list(read_plan_text(text, Path("plan.yaml")).warnings)
    except PlanError as error:
        return list(error.problems)


def only(text: str) -> Problem:
    found = problems(text)
    assert len(found) == 1, "\n".join(map(str, found))
    return found[0]


def read(text: str) -> Plan:
    return read_plan_text(text, Path("plan.yaml")).plan


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_valid(path: Path) -> None:
    assert read_plan(path).warnings == ()


def test_every_field_of_a_plan() -> None:
    loaded = read_plan(PLANS / "features.yaml")
    assert loaded.path == PLANS / "features.yaml"
    assert loaded.warnings == ()
    plan = loaded.plan
    assert plan.params["given"].required and not plan.params["size"].required
    assert plan.defaults.retry is not None and plan.defaults.retry.on == ["infrastructure", "timeout", 75, -9]
    assert plan.steps[0].params == {"command": "python3", "args": ["parts.py", "${{ params.size }}"]}
    assert plan.steps[1].secrets == {"API_TOKEN": "api"}
    assert plan.steps[2].when is not None and plan.steps[2].when.steps() == {"list", "work-on"}
    assert plan.steps[2].params["call"] == "module:function"
    assert plan.steps[3].when is not None and plan.steps[3].when.always


def test_an_old_plan_reads_unchanged() -> None:
    loaded = read_plan(PLANS / "old_pipeline.yaml")
    steps = {step.id: step for step in loaded.plan.steps}
    assert loaded.plan.name == "old_pipeline" and loaded.plan.log_dir == "logs"
    assert steps["fetch"].params["output"] == "build/sources.tar.gz"
    assert steps["image"].params["build_args"] == {"PYTHON_VERSION": "3.10", "DEBUG": "true", "JOBS": "4"}
    assert steps["image"].params["labels"] == {"stage": "test", "8080": "port"}
    assert steps["image"].allow_failure is True
    assert steps["package"].params["args"] == ["-j", "4", "all"]
    assert steps["package"].params["env"] == {"CC": "gcc", "OPTIMIZE": "2", "EMPTY": ""}
    assert steps["push"].when is not None and steps["push"].when.status == "success"
    assert steps["notify"].env == {"VERSION": "1.20", "ANSWER": "no", "HEX": "0x1F"}
    assert steps["notify"].timeout_seconds == 0 and steps["notify"].working_dir == "build"
    assert steps["train"].params["project_id"] == "12" and steps["train"].params["gpu"] is True
    assert loaded.warnings == ()


def test_yes_is_a_text_but_true_enough_for_an_old_flag() -> None:
    plan = read("steps: [{id: no, type: command, command: yes, allow_failure: yes}]")
    assert (plan.steps[0].id, plan.steps[0].params["command"], plan.steps[0].allow_failure) == ("no", "yes", True)


def test_numbers_are_taken_as_written_where_a_text_is_wanted() -> None:
    plan = read(
        "steps: [{id: 1.10, type: command, command: ls}, {id: 2, type: command, command: ls, depends_on: [1.10]}]"
    )
    assert plan.steps[0].id == "1.10" and plan.steps[1].depends_on == ["1.10"]


def test_an_empty_field_is_as_good_as_none() -> None:
    assert read("log_dir:\nenv:\n" + STEP).env == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("3.10", 3.1),
        ("0o14", 12),
        ("0x1f", 31),
        ("007", 7),
        ("-12", -12),
        ("+.5", 0.5),
        ("1e3", 1000.0),
        ("1.", 1.0),
        (".", "."),
        ("-", "-"),
        ("12:30:00", "12:30:00"),
        ("2026-01-01", "2026-01-01"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("-.inf", float("-inf")),
        (".5.5", ".5.5"),
        ("=", "="),
    ],
)
def test_core_schema(text: str, value: Any) -> None:
    result = core_value(text)
    assert result == value and type(result) is type(value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=10) | st.floats(-1e6, 1e6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(JSON)
def test_what_a_yaml_library_writes_is_read_back(data: Any) -> None:
    text = yaml.safe_dump(data)
    document = read_document(text)
    if "&" not in text and "!!" not in text:
        assert document.findings == []
        assert document.data == data


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab:-[]{}#&*!|>'\"%@`, \n\t<?=1.~\x00\x85é", max_size=60))
def test_any_text_is_a_plan_or_a_plan_error(text: str) -> None:
    for found in problems(text):
        assert found.line is not None and found.line >= 1 and found.column is not None and found.column >= 1


@pytest.mark.parametrize(
    ("text", "line", "column", "said"),
    [
        ("a: &x 1\nb: 2\n", 1, 4, "anchor `&x`"),
        ("steps: &x []\nother: *x\n", 2, 8, "alias `*x`"),
        ("steps: !!python/object:os.system []\n", 1, 8, "tag"),
        ("name: !!str x\n" + STEP, 1, 7, "tag"),
        ("name: ! x\n" + STEP, 1, 7, "tag"),
        ("<<: {a: 1}\n" + STEP, 1, 1, "merge key"),
        ("name: a\nname: b\n" + STEP, 2, 1, "duplicate key `name`, first on line 1"),
        (STEP + "---\nsteps: []\n", 2, 1, "second document"),
        ("? [a]\n: b\n", 1, 3, "as a key"),
        ("steps:\n\t- id: a\n", 2, 1, "not YAML"),
        ("steps: [\n", 2, 1, "not YAML"),
        ("steps: '\x07'\n", 1, 9, "not YAML"),
        ("[" * 60 + "]" * 60, 1, 51, "deeper than 50"),
        ("", 1, 1, "the plan is empty"),
        ("# nothing\n", 1, 1, "the plan is empty"),
        ("- a\n", 1, 1, "got a list, wanted a mapping"),
        ("name: x\n", 1, 1, "missing `steps`"),
        ("steps:\n", 1, 7, "missing `steps`"),
        ("steps: []\n", 1, 8, "`steps` is empty"),
        ("steps: {}\n", 1, 8, "got a mapping, wanted a list"),
        ("steps: [text]\n", 1, 9, "got `text`, wanted a mapping"),
    ],
)
def test_what_no_plan_may_have(text: str, line: int, column: int, said: str) -> None:
    found = problems(text)
    assert any((one.line, one.column) == (line, column) and said in one.message for one in found), found


def test_an_alias_bomb_is_refused_at_once() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    started = time.monotonic()
    found = problems(bomb)
    assert time.monotonic() - started < 5
    assert sum("alias" in one.message for one in found) == 78


def test_limits_of_size() -> None:
    assert "more than 8,388,608 bytes" in only("# " + "x" * (9 * 1024 * 1024)).message
    assert "values in one plan" in only("steps: [" + "1," * 500_001 + "]").message
    assert problems("[" * 1_000_000)[0].message.startswith("nested deeper")


def test_everything_wrong_is_reported_at_once_with_its_place() -> None:
    with pytest.raises(PlanError) as caught:
        read_plan(PLANS / "broken.yaml")
    found = {(one.line, one.column, one.path): f"{one.message} | {one.hint}" for one in caught.value.problems}
    expected = {
        (2, 1, "log_dri"): "did you mean `log_dir`?",
        (4, 16, "params.size.type"): "did you mean `integer`?",
        (5, 42, "params.level.default"): "wanted one of `low`, `high`",
        (9, 5, "steps[0].timeout"): "did you mean `timeout_seconds`?",
        (11, 7, "steps[0].download.output"): "missing `output`",
        (12, 7, "steps[0].download.outptu"): "did you mean `output`?",
        (13, 15, "steps[0].download.sha256"): "64 hexadecimal digits",
        (16, 25, "steps[1].depends_on[1]"): "unknown step `fetsh`",
        (17, 22, "steps[1].timeout_seconds"): "got `-5`, wanted at least 0",
        (21, 5, "steps[1].download"): "block `download` on a step of type `docker_build`",
        (23, 9, "steps[2].id"): "duplicate step id `build`",
        (24, 11, "steps[2].type"): "did you mean `command`?",
        (29, 11, "steps[3].args"): "got `hello`, wanted a list",
        (30, 5, "steps[3].dependsOn"): "did you mean `depends_on`?",
        (34, 12, "steps[4].args[0]"): "did you mean `size`?",
        (34, 34, "steps[4].args[1]"): "no output `sizes`",
        (34, 70, "steps[4].args[2]"): "no step `feth`",
        (35, 5, "steps[5].command"): "missing `command`",
        (35, 9, "steps[5].id"): "would share the log name",
        (37, 12, "steps[5].args[0]"): "unexpected",
        (38, 33, "steps[5].when.status"): "did you mean `success`?",
        (42, 18, "steps[6].depends_on[0]"): "`loop-1 -> loop-3 -> loop-2 -> loop-1`",
        (54, 11, "steps[9].when"): "can never be true",
        (58, 18, "steps[10].depends_on[0]"): "depends on itself",
        (62, 25, "steps[11].resources.memory"): "got `lots`",
        (62, 31, "steps[11].resources.gpu"): "did you mean `gpus`?",
        (62, 45, "steps[11].resources.cpus"): "got `true`, wanted a number",
        (63, 27, "steps[11].retry.max_attempts"): "got `0`, wanted at least 1",
        (63, 47, "steps[11].retry.on[2]"): "`infrastructure`, `timeout`",
        (64, 12, "steps[11].cache"): "`true` or `false` or a mapping",
        (65, 14, "steps[11].secrets"): "a list or a mapping",
        (66, 5, "steps[12]"): "wanted a mapping",
        (67, 5, "steps[13].hf_download_model"): "missing block `hf_download_model` | it needs `model_id`",
    }
    for place, said in expected.items():
        assert place in found and said in found[place], (place, said, found.get(place))
    assert len(found) == len(expected), sorted(found.keys() - expected.keys())


def test_a_plan_error_says_all_and_survives_pickling() -> None:
    with pytest.raises(PlanError) as caught:
        read_plan_text("nmae: x\n" + STEP, Path("dir/plan.yaml"))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == "dir/plan.yaml:1:1: error: unknown key `nmae`\n  hint: did you mean `name`?"
    assert copy.problems == caught.value.problems
    assert isinstance(copy.problems[0], Problem)


def test_a_problem_inside_a_string_key_points_to_the_key() -> None:
    found = only("steps:\n  - id: a\n    type: command\n    command: ls\n    'work-dir': x\n")
    assert (found.line, found.column, found.hint) == (5, 5, "did you mean `working_dir`?")


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("type: download, url: http://x, output: y", "write it inside the block `download:`"),
        ("type: download, download: text", "got `text`, wanted a mapping"),
        ("type: download", "missing block `download`"),
        ("type: command, command: ls, params: {}", "write the fields of `command` on the step"),
        ("type: docker_push, docker_push: {image: x}, command: ls", "block `command` on a step of type `docker_push`"),
        ("type: command, command: ls, download: {}", "block `download` on a step of type `command`"),
        ("type: command, command: [a]", "got a list, wanted a text"),
        ("type: command, command: true", 'quote it: `"true"`'),
        ("type: command, command: ls, timeout_seconds: soon", "got `soon`, wanted a number"),
        ("type: command, command: ls, timeout_seconds: true", "wanted a number"),
        ("type: command, command: ls, allow_failure: maybe", "wanted `true` or `false`"),
        ("type: command, command: ls, env: [A]", "wanted a mapping"),
        ("type: command, command: ls, env: {A: [1]}", "got a list, wanted a text"),
        ("type: command, command: ls, when: {step: a}", "needs `status`, `exit_code` or `outputs`"),
        ("type: command, command: ls, when: sometimes", "wanted a mapping"),
        ("type: command, command: ls, when: {stpe: b, status: success}", "did you mean `step`?"),
        ("type: 3, command: ls", "unknown step type `3`"),
        ("command: ls", "missing `type`"),
        ("type: command, command: ls, cache: {input: [x]}", "did you mean `inputs`?"),
        ("type: command, command: ls, retry: 3", "got `3`, wanted a mapping"),
        ("type: command, command: ls, secrets: [[a]]", "wanted a text"),
        ("type: docker_build, docker_build: {image: x, build_args: [A=1]}", "wanted a mapping"),
        ("type: python, python: {call: main}", "got `main`, wanted `module:function`"),
        ("type: container_job, container_job: {command: x, mounts: [/a]}", "got `/a`, wanted `host:/container`"),
    ],
)
def test_fields_that_do_not_fit(step: str, said: str) -> None:
    found = problems("steps: [{id: x, " + step + "}]")
    assert any(said in str(one) for one in found), "\n".join(map(str, found))


def test_a_template_may_stand_where_a_block_wants_any_type() -> None:
    plan = read(
        "params: {g: {type: boolean, default: true}}\n"
        "steps: [{id: a, type: container_job, container_job: {command: ls, gpu: '${{ params.g }}'}}]"
    )
    assert plan.steps[0].params["gpu"] == "${{ params.g }}"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read the plan"):
        read_plan(tmp_path / "missing.yaml")
    with pytest.raises(PlanError, match="cannot read the plan"):
        read_plan(tmp_path)
    bad = tmp_path / "bad.yaml"
    bad.write_bytes(b"name: x\nlog_dir: \xff\n")
    with pytest.raises(PlanError, match=r"bad.yaml:2:10: error: not UTF-8"):
        read_plan(bad)
    marked = tmp_path / "marked.yaml"
    marked.write_text("\ufeff" + STEP, encoding="utf-8")
    assert read_plan(marked).plan.name == "marked"


def test_ten_thousand_steps_are_read_fast() -> None:
    text = "steps:\n" + "".join(
        f"  - id: s{n}\n    type: command\n    command: echo\n    args: [hello, '{n}']\n    env: {{A: 1}}\n"
        + (f"    depends_on: [s{n - 1}]\n" if n else "")
        for n in range(10_000)
    )
    started = time.process_time()
    assert len(read(text).steps) == 10_000
    # Measured at 1.3 s of processor time; the limit catches what grows with the square of the steps.
    assert time.process_time() - started < 15


def _old_list(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "steps.json"
    path.write_text(json.dumps(data, indent="\t"))
    return path


def test_an_old_list_runs_its_steps_one_after_the_other(tmp_path: Path) -> None:
    steps = [
        {"name": "Get it", "command": "curl", "args": ["-O", "x"], "timeoutSeconds": 30, "workingDir": "/tmp"},
        {"name": "Get it", "command": "false", "allowFailure": True, "env": {"A": 1, "EMOJI": "\U0001f600"}},
        {"command": "echo", "args": ["\U0001f600", "a/b"], "timeoutSeconds": 0},
        {"name": "..", "command": "echo"},
    ]
    plan = read_steps_json(_old_list(tmp_path, {"logDir": "out", "steps": steps})).plan
    assert [step.id for step in plan.steps] == ["Get-it", "Get-it-2", "step-3", "step-4"]
    assert plan.log_dir == "out" and plan.steps[0].working_dir == "/tmp" and plan.steps[0].timeout_seconds == 30
    assert plan.steps[1].env == {"A": "1", "EMOJI": "\U0001f600"} and plan.steps[1].depends_on == ["Get-it"]
    after = plan.steps[2].when
    assert after is not None and [(part.step, part.status) for part in after.any or []] == [
        ("Get-it-2", "success"),
        ("Get-it-2", "failure"),
    ]
    assert plan.steps[2].timeout_seconds is None and plan.steps[3].depends_on == ["step-3"]
    assert read_any(_old_list(tmp_path, {"steps": steps})).plan.steps == plan.steps


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"steps": []}, "wanted at least 1"),
        ({"steps": [{"name": "a"}]}, "missing `command`"),
        ({"steps": [{"command": "a", "cmd": "b"}]}, "unknown key `cmd`"),
        ([], "wanted at least 1"),
        ([{"command": "a"}, {"command": "a", "cmd": "b"}], r"steps.json:7:3: error: unknown key `cmd` in `steps\[1\]`"),
        ("a", "got `a`, wanted a list of steps or a mapping with `steps`"),
    ],
)
def test_an_old_list_that_is_wrong(tmp_path: Path, data: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        read_steps_json(_old_list(tmp_path, data))


def test_a_bare_list_and_its_braces_are_taken_as_they_stand(tmp_path: Path) -> None:
    steps = [{"command": "echo", "args": ["${{ params.x }} $HOME"], "env": {"A": "a${{"}}]
    for read in (read_steps_json, read_any):
        (step,) = read(_old_list(tmp_path, steps)).plan.steps
        given = render({"args": step.params["args"], "env": step.env}, {})
        assert given == {"args": ["${{ params.x }} $HOME"], "env": {"A": "a${{"}}


def test_hints_leave_out_steps_without_an_id() -> None:
    text = "steps:\n  - {type: command, command: a}\n  - {id: b, type: command, command: b, depends_on: [zzzz]}\n"
    with pytest.raises(PlanError, match=r"steps: `b`$"):
        read_plan_text(text, Path("plan.yaml"))


def test_an_old_list_that_is_not_json(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    path.write_text('{"steps": [\n  {"command": "a",}]}')
    with pytest.raises(PlanError, match=r"steps.json:2:\d+: error: not JSON"):
        read_steps_json(path)


def test_a_plan_in_json_is_a_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"steps": [{"id": "a", "type": "command", "command": "ls"}]}))
    assert read_any(path).plan.steps[0].id == "a"


@pytest.mark.parametrize(
    ("retry", "longest"),
    [
        ("backoff_s: 300", 300),
        ("backoff_s: 2", 60),
        ("max_attempts: 2", 60),
        ("backoff_s: 300, max_backoff_s: 100", 100),
    ],
)
def test_a_long_backoff_is_not_cut_by_a_default(retry: str, longest: float) -> None:
    step = read(f"steps: [{{id: a, type: command, command: ls, retry: {{{retry}}}}}]\n").steps[0]
    assert step.retry is not None
    assert step.retry.max_backoff_s == longest
