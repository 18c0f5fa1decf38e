"""What must hold between the fields of a plan: references, cycles, conditions, templates, ids, values, params."""

import pickle
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.checks import check_plan, dependencies, find_problems, resolve_params, topological_order
from bridge.order import cycles
from bridge.plan import Condition, Param, Plan, Step, with_defaults
from bridge.problems import PlanError, Problem, nearest
from bridge.reader import read_plan_text


def problems(text: str) -> list[Problem]:
    try:
        return list(read_plan_text(text, Path("plan.yaml")).warnings)
    except PlanError as error:
        return list(error.problems)


def said(text: str) -> str:
    return "\n".join(map(str, problems(text)))


def command(step_id: str, more: str = "") -> str:
    return f"  - {{id: {step_id}, type: command, command: ls{', ' + more if more else ''}}}\n"


def plan_text(*steps: str) -> str:
    return "steps:\n" + "".join(steps)


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("timeout", ["timeout_seconds", "type"], "timeout_seconds"),
        ("dependsOn", ["depends_on", "id"], "depends_on"),
        ("needs", ["depends_on", "env"], "depends_on"),
        ("if", ["when", "id"], "when"),
        ("workingDir", ["working_dir"], "working_dir"),
        ("cwd", ["working_dir", "command"], "working_dir"),
        ("continue-on-error", ["allow_failure"], "allow_failure"),
        ("comand", ["command", "cache"], "command"),
        ("Steps", ["steps"], "steps"),
        ("zzz", ["steps"], None),
    ],
)
def test_nearest_word(word: str, known: list[str], meant: str | None) -> None:
    assert nearest(word, known) == meant


@pytest.mark.parametrize("key", ["timeout", "dependsOn", "needs", "if", "cwd", "environment", "retries", "foreach"])
def test_what_people_write_in_other_tools_gets_a_hint(key: str) -> None:
    assert "did you mean `" in said(plan_text(command("a", f"{key}: x")))


def test_dependencies_come_from_three_places() -> None:
    step = Step(
        id="z",
        type="command",
        params={"command": "${{ steps.b.outputs.x }}", "args": ["${{ steps['c-1'].outcome }}"]},
        depends_on=["a"],
        env={"E": "${{ steps.e.outputs.y }}"},
        matrix={"m": "${{ steps.m.outputs.list }}"},
        when=Condition(
            all=[
                Condition(any=[Condition(step="w", status="success")]),
                Condition(step="v", outputs={"o": "${{ steps.o.outputs.p }}"}),
            ]
        ),
    )
    assert dependencies(step) == {"a", "b", "c-1", "e", "m", "w", "v", "o"}


def test_topological_order_keeps_plan_order_where_it_can() -> None:
    plan = Plan(
        steps=[
            Step(id="c", type="command", params={"command": "${{ steps.a.outputs.x }}"}),
            Step(id="b", type="command", depends_on=["a"]),
            Step(id="a", type="command"),
            Step(id="d", type="command"),
        ]
    )
    assert topological_order(plan) == ["a", "c", "b", "d"]
    circle = Plan(steps=[Step(id="a", type="x", depends_on=["b"]), Step(id="b", type="x", depends_on=["a"])])
    with pytest.raises(PlanError, match="a -> b -> a"):
        topological_order(circle)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=8))
def test_a_cycle_is_found_exactly_when_there_is_one(graph: list[list[int]]) -> None:
    needed = {str(n): sorted({str(o) for o in others if o < len(graph) and o != n}) for n, others in enumerate(graph)}
    reach = {name: set(others) for name, others in needed.items()}
    for _ in graph:
        reach = {name: seen.union(*(reach[other] for other in seen)) for name, seen in reach.items()}
    found = cycles(needed)
    assert bool(found) == any(name in seen for name, seen in reach.items())
    for cycle in found:
        assert len(set(cycle)) == len(cycle)
        assert all(after in needed[name] for name, after in zip(cycle, [*cycle[1:], cycle[0]], strict=True))


def test_cycles_in_a_large_plan_are_found_in_linear_time() -> None:
    size = 5000
    needed = {str(n): [str(o) for o in (n - 1, n - 2) if o >= 0] for n in range(size)}
    needed["0"] = ["1"]
    assert cycles(needed) == [["0", "1"]]
    ring = {str(n): [str((n + 1) % size)] for n in range(size)}
    assert [len(cycle) for cycle in cycles(ring)] == [size]


@pytest.mark.parametrize(
    ("steps", "path"),
    [
        ((command("a", "depends_on: [b]"), command("b", "depends_on: [a]")), "a -> b -> a"),
        ((command("a", "when: {step: b, status: success}"), command("b", "depends_on: [a]")), "a -> b -> a"),
        (
            (command("a", "args: ['${{ steps.b.outputs.x }}']"), command("b", "when: {step: a, status: failure}")),
            "a -> b -> a",
        ),
        (
            (command("a", "depends_on: [c]"), command("b", "depends_on: [a]"), command("c", "depends_on: [b]")),
            "a -> c -> b -> a",
        ),
    ],
)
def test_a_cycle_is_printed_as_a_path(steps: tuple[str, ...], path: str) -> None:
    assert f"`{path}`" in said(plan_text(*steps))


NEVER = [
    ("{step: a, status: success, exit_code: 3}", "success is exit code 0"),
    ("{step: a, status: failed, exit_code: 0}", "success is exit code 0"),
    ("{step: a, exit_code: 300}", "no process ends"),
    ("{step: a, exit_code: []}", "no process ends"),
    ("{step: a, status: skipped}", "never skipped"),
    ("{step: b, status: skipped, exit_code: 1}", "exit code"),
    ("{step: b, status: skipped, outputs: {x: 1}}", "no outputs"),
    ("{step: a, status: cancelled, outputs: {x: 1}}", "no outputs"),
    ("{all: [{step: a, status: success}, {step: a, status: failure}]}", "at once"),
    ("{all: [{step: a, exit_code: 1}, {step: a, exit_code: [2, 3]}]}", "no process ends"),
    ("{all: [{step: a, outputs: {x: 1}}, {step: a, outputs: {x: 2}}]}", "two values"),
    ("{all: [{step: a, status: failure}, {step: b, status: success}]}", "only runs when step `a` has succeeded"),
    ("{all: [{step: a, status: failed}, {step: c, status: timed_out}]}", "only runs when step `a` has succeeded"),
    ("{any: [{step: a, status: skipped}, {all: [{step: a, exit_code: 0}, {step: a, exit_code: 1}]}]}", ""),
    ("{any: []}", "empty"),
]
POSSIBLE = [
    "always",
    "{step: a, status: success, exit_code: 0}",
    "{step: a, status: failure, exit_code: [0, 3]}",
    "{step: a, exit_code: -9}",
    "{step: b, status: skipped}",
    "{step: a, outputs: {x: 1}}",
    "{step: a, status: failure, outputs: {x: 1}}",
    "{any: [{step: a, status: success}, {step: a, status: failure}]}",
    "{all: [{step: a, status: failure}, {step: b, status: skipped}]}",
    "{all: [{step: a, status: failure}, {step: h, status: success}]}",
    "{all: [{step: a, outputs: {x: '${{ run.id }}'}}, {step: a, outputs: {x: 2}}]}",
    "{all: []}",
]


def _with_condition(when: str) -> str:
    return plan_text(
        command("a"),
        command("b", "depends_on: [a]"),
        command("c", "args: ['${{ steps.b.outputs.x }}']"),
        command("h", "when: {step: a, status: failure}"),
        command("z", f"when: {when}"),
    )


@pytest.mark.parametrize(("when", "why"), NEVER)
def test_a_condition_that_can_never_be_true(when: str, why: str) -> None:
    found = problems(_with_condition(when))
    assert [one.path for one in found] == ["steps[4].when"], found
    assert "can never be true" in found[0].message and why in found[0].message


@pytest.mark.parametrize("when", POSSIBLE)
def test_a_condition_that_can_be_true(when: str) -> None:
    assert problems(_with_condition(when)) == []


def test_many_conditions_on_a_long_chain_are_checked_in_time() -> None:
    chain = [command(f"s{n}", f"depends_on: [s{n - 1}]" if n else "") for n in range(1500)]
    handlers = [command(f"h{n}", f"when: {{step: s{n}, status: failure}}") for n in range(1500)]
    started = time.process_time()
    assert problems(plan_text(*chain, *handlers)) == []
    assert time.process_time() - started < 15


def test_a_condition_of_too_many_cases_counts_as_possible() -> None:
    either = "{any: [{step: a, status: success}, {step: a, status: failure}]}"
    assert problems(_with_condition("{all: [" + ", ".join([either] * 40) + "]}")) == []


@pytest.mark.parametrize(
    ("when", "why"),
    [
        ("{step: z, status: success}", "looks at the step itself"),
        ("{any: [{step: a, status: success}, {step: bb, status: success}]}", "unknown step `bb`"),
        ("{step: d, outputs: {sise: 1}}", "did you mean `size`?"),
    ],
)
def test_a_condition_that_names_what_is_not_there(when: str, why: str) -> None:
    download = "  - {id: d, type: download, download: {url: 'http://x/y', output: y}}\n"
    found = said(plan_text(command("a"), download, command("z", f"when: {when}")))
    assert why in found and "never" not in found


TEMPLATES = [
    ("${{ params.sise }}", "did you mean `size`?"),
    ("${{ parms.size }}", "did you mean `params`?"),
    ("${{ steps.fetsh.outputs.size }}", "did you mean `fetch`?"),
    ("${{ steps.fetch.outputs.sizes }}", "did you mean `size`?"),
    ("${{ steps.fetch.size }}", "did you mean `steps.fetch.outputs.size`?"),
    ("${{ steps.fetch.state }}", "did you mean `steps.fetch.outputs.state`?|a step has no `state`"),
    ("${{ steps.named.outputs.z }}", "its outputs: `y`"),
    ("${{ steps.z.outputs.x }}", "its own results"),
    ("${{ steps[params.size].outputs.x }}", "not written out"),
    ("${{ steps.two-words.outputs.x }}", 'write `steps["two-words"]`'),
    ("${{ env.HOEM }}", "did you mean `HOME`?"),
    ("${{ matrix.m }}", "has no `matrix`"),
    ("${{ run.name }}", "there are: `attempt`, `id`"),
    ("${{ params.size | uper }}", "did you mean `upper`?"),
    ("${{ params.size", "without `}}`"),
    ("${{ 1 + }}", "unexpected"),
    ("${{ foo(1) }}", "functions cannot be called"),
]
GOOD_TEMPLATES = [
    "${{ params.size }}",
    "${{ params.maybe | default(3) }}",
    "${{ steps.fetch.outputs.size }}",
    "${{ steps.any.outputs.whatever }}",
    "${{ steps.fetch.outcome }} ${{ steps.any.exit_code }}",
    "${{ steps['two-words'].outputs.x }}",
    "${{ steps.fetch.outputs.maybe is defined }}",
    "${{ env.HOME }} ${{ env.OWN }} ${{ env.ALL }}",
    "${{ run.id }}-${{ run.attempt }}",
]


def _with_template(template: str) -> str:
    quoted = template.replace("'", "''")
    return "params: {size: {default: a}}\nenv: {HOME: x}\ndefaults: {env: {ALL: y}}\n" + plan_text(
        "  - {id: fetch, type: download, download: {url: 'http://x/y', output: y}}\n",
        command("any"),
        command("named", "outputs: [y]"),
        command("two-words"),
        command("z", f"env: {{OWN: q}}, args: ['{quoted}']"),
    )


@pytest.mark.parametrize(("template", "why"), TEMPLATES)
def test_a_template_that_names_what_is_not_there(template: str, why: str) -> None:
    found = problems(_with_template(template))
    assert found and all(one.path == "steps[4].args[0]" for one in found), found
    assert any(part in "\n".join(map(str, found)) for part in why.split("|")), found


@pytest.mark.parametrize("template", GOOD_TEMPLATES)
def test_a_template_that_is_right(template: str) -> None:
    assert problems(_with_template(template)) == []


@pytest.mark.parametrize(
    "text",
    [
        "name: '${{ run.id }}'\n" + plan_text(command("a")),
        "log_dir: '${{ run.id }}'\n" + plan_text(command("a")),
        "params: {a: {default: '${{ run.id }}'}}\n" + plan_text(command("a")),
        "env: {A: '${{ steps.a.outputs.x }}'}\n" + plan_text(command("a")),
        "env: {A: '${{ env.B }}', B: x}\n" + plan_text(command("a")),
        "defaults: {env: {A: '${{ steps.a.outputs.x }}'}}\n" + plan_text(command("a")),
        plan_text(command("a", "locks: ['${{ run.id }}']")),
        plan_text(command("a", "outputs: ['${{ run.id }}']")),
        plan_text(command("a", "matrix: {m: '${{ matrix.m }}'}")),
        plan_text(command("a", "matrix: {m: '${{ run.attempt }}'}")),
        "env: {A: '${{ run.attempt }}'}\n" + plan_text(command("a")),
        plan_text(command("a", "env: {A: '${{ env.B }}', B: x}")),
    ],
)
def test_a_template_where_none_is_rendered(text: str) -> None:
    found = problems(text)
    assert found and all(one.severity == "error" for one in found)


@pytest.mark.parametrize("program", ["sh", "bash", "/usr/bin/zsh", "dash", "ksh", "python", "python3.12"])
@pytest.mark.parametrize("flag", ["-c", "-lc", "-ec"])
def test_a_template_in_a_script_is_a_warning_that_points_to_env(program: str, flag: str) -> None:
    flag = "-c" if "python" in program else flag
    text = f"steps: [{{id: a, type: command, command: {program}, args: [{flag}, 'echo ${{{{ run.id }}}}']}}]"
    (found,) = problems(text)
    assert found.severity == "warning" and "`env`" in found.hint and found.path == "steps[0].args[1]"
    assert problems(f"steps: [{{id: a, type: command, command: {program}, args: [x.sh, '${{{{ run.id }}}}']}}]") == []


def test_a_template_where_a_shell_cannot_take_data_is_an_error() -> None:
    text = "steps: [{id: a, type: command, command: sh, args: [-c, 'echo `date ${{ run.id }}`']}]"
    assert [one.severity for one in problems(text)] == ["error", "warning"]


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        (["a", "a"], "duplicate step id `a`, first used by `steps[0]`"),
        (["'a b'", "a_b"], "share the log name"),
        (["a/b", "'a\\b'"], "share the log name"),
        (["Build", "build"], "share the log name"),
        (["' a'", "a"], "share the log name"),
        (["'..'"], "not a file name"),
        (["''"], "an empty step id"),
        (["'  '"], "an empty step id"),
        (["x" * 101], "101 characters, the limit is 100"),
        (['"a\\x07"'], "cannot be printed"),
        (["events.jsonl"], "the run's own events"),
    ],
)
def test_ids_that_cannot_be_file_names(ids: list[str], why: str) -> None:
    assert why in said(plan_text(*(command(step_id) for step_id in ids)))


def test_ids_that_are_instances_of_a_matrix() -> None:
    found = said(plan_text(command("a", "matrix: {m: [1, 2]}"), command("a.1"), command("a.x")))
    assert "`a.1` is also the name of an instance of the matrix step `a`" in found and "a.x" not in found


@pytest.mark.parametrize(
    ("field", "why"),
    [
        ("matrix: {}", "is empty"),
        ("matrix: {m: []}", "has no values"),
        ("matrix: {m: text}", "wanted a list or a template"),
        ("matrix: {m: 3}", "wanted a list or"),
        ("resources: {memory: 8 giga}", "got `8 giga`"),
        ("resources: {memory: -1}", "got `-1`"),
        ("resources: {cpus: -1}", "at least 0"),
        ("resources: {gpus: two}", "got `two`"),
        ("resources: {gpus: 1.5}", "wanted a part of one, or a whole number"),
        ("resources: {nodes: 0.5}", "wanted a whole number of at least 1"),
        ("resources: {nodes: 2, actor: a}", "a step on several nodes cannot name an `actor`"),
        ("resources: {actor: ''}", "wanted a name"),
        ('artifacts: ["${{ params.none }}"]', "there is no param `none`"),
        ("resources: {custom: {x: .nan}}", "got `nan`"),
        ("retry: {on: [0]}", "got exit code `0`"),
        ("retry: {on: [256]}", "got exit code `256`"),
        ("retry: {max_attempts: 1.5}", "wanted a whole number"),
        ("timeout_seconds: -1", "at least 0"),
        ("timeout_seconds: .inf", "finite number"),
        ("max_parallel: 0", "at least 1"),
        ("secrets: ['a b']", "cannot be the name of an environment variable"),
        ("secrets: {A: ../x}", "not the name of a secret"),
        ("env: {'A=B': x}", "cannot be the name of an environment variable"),
        ('env: {A: "x\\0y"}', "NUL"),
        ("max_parallel: 2", "no effect without `matrix`"),
    ],
)
def test_values_that_make_no_sense(field: str, why: str) -> None:
    assert why in said(plan_text(command("a", field)))


def test_steps_of_one_actor_ask_for_the_same() -> None:
    same = "resources: {actor: m, gpus: 1}"
    assert said(plan_text(command("a", same), command("b", same))) == ""
    text = said(plan_text(command("a", same), command("b", "resources: {actor: m}")))
    assert "steps `a` and `b` name the actor `m` and ask for different things" in text
    assert "hint: give both the same `resources` and `image`, or another `actor`" in text


@pytest.mark.parametrize("memory", ["1024", "8GiB", "512 MB", "1.5g", "100b", "'${{ params.m }}'"])
def test_memory_texts(memory: str) -> None:
    assert said("params: {m: {default: 1G}}\n" + plan_text(command("a", f"resources: {{memory: {memory}}}"))) == ""


@pytest.mark.parametrize(
    ("env", "warned"),
    [
        ("{HF_TOKEN: abc}", True),
        ("{AWS_SECRET: abc}", True),
        ("{DB_PASSWORD: abc}", True),
        ("{OPENAI_API_KEY: abc}", True),
        ("{HF_TOKEN: '${{ params.t }}'}", False),
        ("{HF_TOKEN: ''}", False),
        ("{TOKENIZERS_PARALLELISM: x}", False),
        ("{MAX_TOKENS: 3}", False),
        ("{HF_TOKEN_PATH: /x}", False),
    ],
)
def test_a_secret_written_in_the_plan_is_a_warning(env: str, warned: bool) -> None:
    params = "params: {t: {}}\n"
    for text in (
        params + plan_text(command("a", f"env: {env}")),
        params + f"env: {env.replace('params.t', 'params.t')}\n" + plan_text(command("a")),
        params + f"steps: [{{id: a, type: package_build, package_build: {{command: ls, env: {env}}}}}]",
    ):
        found = problems(text)
        assert [one.severity for one in found] == (["warning"] if warned else [])
        assert all("secrets" in one.hint and "abc" not in str(one) for one in found)


@pytest.mark.parametrize(
    ("param", "why"),
    [
        ("{type: integer, default: x}", "got `x`, wanted a whole number"),
        ("{type: integer, default: true}", "wanted a whole number"),
        ("{default: 3}", "got `3`, wanted a text"),
        ("{choices: [a, b], default: c}", "wanted one of `a`, `b`"),
        ("{type: number, choices: [1, x]}", "choice `x` is not a number"),
        ("{type: text}", "did you mean `string`?"),
        ("{defualt: 3}", "did you mean `default`?"),
        ("3", "wanted a mapping"),
    ],
)
def test_declarations_of_params(param: str, why: str) -> None:
    assert why in said(f"params: {{p: {param}}}\n" + plan_text(command("a")))


def test_a_param_that_is_no_word() -> None:
    assert "wanted letters, digits" in said("params: {'a-b': {}}\n" + plan_text(command("a")))


PLAN = Plan(
    params={
        "text": Param(default="x"),
        "count": Param(type="integer", default=1, choices=[1, 2]),
        "rate": Param(type="number", default=None),
        "on": Param(type="boolean", default=False),
        "names": Param(type="list", default=[]),
        "table": Param(type="object", default={}),
        "must": Param(),
    },
    steps=[Step(id="a", type="command", params={"command": "ls"})],
)


def test_params_are_read_as_their_types() -> None:
    given = {
        "text": "3",
        "count": "2",
        "rate": "1e-3",
        "on": "yes",
        "names": '["a", 1]',
        "table": '{"k": null}',
        "must": "",
    }
    expected: dict[str, Any] = {
        "text": "3",
        "count": 2,
        "rate": 0.001,
        "on": True,
        "names": ["a", 1],
        "table": {"k": None},
        "must": "",
    }
    assert resolve_params(PLAN, given) == expected
    assert resolve_params(PLAN, {"must": "m"}) == {
        "text": "x",
        "count": 1,
        "rate": None,
        "on": False,
        "names": [],
        "table": {},
        "must": "m",
    }
    assert resolve_params(PLAN, {"must": "m", "names": [1], "count": 2})["names"] == [1]


def test_every_param_that_does_not_fit_is_reported() -> None:
    given = {"cuont": "1", "count": "3", "rate": "fast", "on": "perhaps", "names": "a,b", "table": "[]", "text": 3}
    with pytest.raises(PlanError) as caught:
        resolve_params(PLAN, given)
    text = str(pickle.loads(pickle.dumps(caught.value)))
    for part in (
        "unknown param `cuont`\n  hint: did you mean `count`?",
        "param `count`: got `3`, wanted one of `1`, `2`",
        "param `rate`: got `fast`, wanted a number",
        "param `on`: got `perhaps`, wanted `true` or `false`",
        'param `names`: got `a,b`, wanted a list in JSON, like `["a", "b"]`',
        "param `table`",
        "param `text`: got `3`, wanted a text",
        "param `must`: no value, and it has no default\n  hint: give it with `-p must=VALUE`",
    ):
        assert part in text, part


def test_a_plan_built_in_python_is_checked_as_well() -> None:
    good = Plan(steps=[Step(id="a", type="command", params={"command": "sh", "args": ["-c", "echo ${{ run.id }}"]})])
    assert [one.severity for one in check_plan(good)] == ["warning"]
    bad = Plan(
        steps=[
            Step(id="a", type="command", params={"comand": "ls"}, depends_on=["b"]),
            Step(id="c", type="download", params={"url": 3, "output": "x"}),
        ]
    )
    with pytest.raises(PlanError) as caught:
        check_plan(bad, "build.py")
    text = str(caught.value)
    assert "build.py: error: missing `command`" in text and "did you mean `command`?" in text
    assert "unknown step `b`" in text and "`url`: got `3`, wanted a text" in text


def test_a_plan_of_too_many_steps() -> None:
    steps = [Step(id=str(n), type="command", params={"command": "ls"}) for n in range(20_001)]
    with pytest.raises(PlanError, match="20,001 steps, the limit is 20,000"):
        check_plan(Plan(steps=steps))


def test_what_drives_the_engine_does_not_run_in_an_image() -> None:
    steps = [Step(id="a", type="command", params={"command": "true"}), Step(id="b", type="docker_push", params={})]
    plan = Plan(image="own/image", steps=steps)
    assert [step.image for step in with_defaults(plan).steps] == ["own/image", None]
    named = plan.model_copy(update={"steps": [steps[1].model_copy(update={"image": "own/image"})]})
    (problem,) = [found for found in find_problems(named) if found.path == ("steps", 0, "image")]
    assert "drives the container engine" in problem.message
