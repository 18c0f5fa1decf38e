"""A plan as a drawing: every dependency once, and no label that breaks out of its quotes."""

import re
from pathlib import Path

import pytest

from bridge.graph import dot, edges, mermaid
from bridge.plan import Condition, Plan, Step
from bridge.reader import read_plan

PLAN = Plan(
    name='a "plan"',
    steps=[
        Step(id="a", type="command", params={"command": "ls"}),
        Step(id="b", name='quo"te </b> `x` \\n\n[#]', type="command", params={"command": "ls"}, depends_on=["a"]),
        Step(
            id="c",
            type="command",
            params={"command": "${{ steps.a.outputs.x }} ${{ steps['b'].outcome }}"},
            depends_on=["b"],
            matrix={"m": [1, 2], "n": "${{ params.n }}"},
        ),
        Step(
            id="d",
            type="command",
            depends_on=["a"],
            when=Condition(any=[Condition(step="a", status="failure"), Condition(step="c", exit_code=[1, 2])]),
        ),
        Step(id="e", type="command", when=Condition(always=True)),
    ],
)


def test_one_edge_for_each_pair() -> None:
    assert [tuple(edge) for edge in edges(PLAN)] == [
        ("a", "b", "", False),
        ("a", "c", "x", False),
        ("b", "c", "outcome", False),
        ("a", "d", "failure", True),
        ("c", "d", "exit code [1, 2]", True),
    ]


def test_mermaid() -> None:
    text = mermaid(PLAN)
    assert text.startswith("flowchart LR\n") and text.endswith("\n")
    lines = text.splitlines()
    assert '  s0["a<br/>command"]' in lines
    assert '  s2[["c<br/>command<br/>matrix: m 2 x n"]]' in lines
    assert '  s4["e<br/>command<br/>always"]' in lines
    assert "  s0 --> s1" in lines
    assert '  s0 -.->|"failure"| s3' in lines
    assert '  s0 -->|"x"| s2' in lines
    hostile = lines[2]
    assert re.fullmatch(r'  s1\["[^"`\\<>\[\]]*<br/>command"\]', hostile), hostile
    assert "quo#34;te" in hostile


def test_dot() -> None:
    text = dot(PLAN)
    assert text.startswith('digraph "a \\"plan\\"" {') and text.endswith("}\n")
    assert '  "a" -> "d" [label="failure", style=dashed];' in text
    assert '  "a" -> "b";' in text
    assert 'label="quo\\"te </b> `x` \\\\n [#]\\ncommand"' in text
    assert "peripheries=2" in text
    for line in text.splitlines():
        assert len(re.findall(r'(?<!\\)"', line.replace("\\\\", ""))) % 2 == 0, line


@pytest.mark.parametrize("name", ["features.yaml", "old_pipeline.yaml"])
def test_plans_of_files(name: str) -> None:
    plan = read_plan(Path(__file__).parent / "plans" / name).plan
    assert mermaid(plan).count("\n") == 1 + len(plan.steps) + len(list(edges(plan)))
    assert dot(plan).count(" -> ") == len(list(edges(plan)))
