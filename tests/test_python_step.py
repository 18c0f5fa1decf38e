"""The `python` step, run by the real host."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from steps import StepResult
from steps.python import Params, code_files

Run = Callable[..., Awaitable[StepResult]]

MODULE = """
import os, sys
from dataclasses import dataclass
def plain(a, b=2): return {"sum": a + b}
def value(): return [1, 2]
def nothing(): pass
def with_context(context, a): return {"key": context.key, "a": a, "cwd": os.getcwd()}
def own(context="mine"): return context
def keeping(context):
    made = [context.keep("list", list) for _ in "ab"]
    return {"same": made[0] is made[1], "rank": context.gang.rank, "size": context.gang.size}
def forked():
    if os.fork() == 0:
        return {"from": "child"}
    return {"from": "parent", "status": os.wait()[1]}
class Group:
    @staticmethod
    def method(): return "in a class"
not_callable = 3
"""


@pytest.fixture
def call(tmp_path: Path, run_locally: Run) -> Callable[..., Awaitable[StepResult]]:
    (tmp_path / "tasks_of_plan.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import no_such_module_anywhere\n")
    (tmp_path / "typo.py").write_text("def f(:\n")

    async def run(name: str, **arguments: Any) -> StepResult:
        return await run_locally(type="python", params={"call": name, "arguments": arguments})

    return run


@pytest.mark.parametrize(
    ("name", "arguments", "outputs"),
    [
        ("tasks_of_plan:plain", {"a": 1}, {"sum": 3}),
        ("tasks_of_plan:value", {}, {"result": [1, 2]}),
        ("tasks_of_plan:nothing", {}, {}),
        ("tasks_of_plan:own", {"context": "given"}, {"result": "given"}),
        ("tasks_of_plan:Group.method", {}, {"result": "in a class"}),
        ("math:sqrt", {}, None),
        ("json:dumps", {"obj": [1]}, {"result": "[1]"}),
    ],
)
async def test_functions_are_called(call: Run, name: str, arguments: dict[str, Any], outputs: Any) -> None:
    result = await call(name, **arguments)
    if outputs is None:
        assert (result.outcome, result.final) == ("failed", True)
    else:
        assert (result.outcome, result.outputs) == ("succeeded", outputs), result.error


async def test_a_context_is_given_to_who_asks(call: Run, tmp_path: Path) -> None:
    result = await call("tasks_of_plan:with_context", a=5)
    assert result.outputs == {"key": "flow/run/step/1", "a": 5, "cwd": str(tmp_path)}


async def test_what_a_step_alone_keeps_is_its_own(call: Run) -> None:
    assert (await call("tasks_of_plan:keeping")).outputs == {"same": True, "rank": 0, "size": 1}


async def test_a_forked_child_that_returns_has_no_result(call: Run) -> None:
    assert (await call("tasks_of_plan:forked")).outputs == {"from": "parent", "status": 0}


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("tasks_of_plan:missing", {}, "module `tasks_of_plan` has no `missing`"),
        ("no_module_here:f", {}, "module `no_module_here` of `no_module_here:f` is not found"),
        ("broken:f", {}, "module `no_such_module_anywhere` of `broken:f` is not found"),
        ("no-colon", {}, "wanted `module:function`"),
        ("tasks_of_plan:plain", {"c": 1}, "`tasks_of_plan:plain` got c, wanted `(a, b=2)`"),
        ("tasks_of_plan:not_callable", {}, "is not callable"),
        ("typo:f", {}, "SyntaxError"),
    ],
)
async def test_mistakes_are_told(call: Run, name: str, arguments: dict[str, Any], error: str) -> None:
    result = await call(name, **arguments)
    assert result.outcome == "failed"
    assert error in result.error


def test_the_plans_own_module_is_part_of_the_cache_key(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "module.py").touch()
    assert code_files(Params(call="module:f"), tmp_path) == [tmp_path / "module.py"]
    assert code_files(Params(call="package:f"), tmp_path) == [tmp_path / "package" / "__init__.py"]
    assert code_files(Params(call="json:dumps"), tmp_path) == []
