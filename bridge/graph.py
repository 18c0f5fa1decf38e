"""A plan as a drawing: Mermaid for pages that render it, DOT for Graphviz.

A plain arrow is `depends_on`, a dashed one `when` with what it asks for, a labelled one a template with what it uses.
"""

from collections.abc import Iterator
from typing import NamedTuple

from bridge.expressions import is_template, references
from bridge.order import rendered_values, waits_for
from bridge.plan import Condition, Plan, Step
from bridge.problems import brief


class Edge(NamedTuple):
    """`after` waits for `before`."""

    before: str
    after: str
    label: str
    dashed: bool


def edges(plan: Plan) -> Iterator[Edge]:
    """One edge for each pair of steps of which one waits for the other, in plan order."""
    needed = waits_for(plan)
    for step in plan.steps:
        asked = _asked(step.when) if step.when is not None else {}
        used = _used(step)
        for before in needed[step.id]:
            words = asked.get(before) or used.get(before, [])
            yield Edge(before, step.id, ", ".join(dict.fromkeys(words)), before in asked)


def _asked(condition: Condition) -> dict[str, list[str]]:
    asked: dict[str, list[str]] = {}
    if condition.step is not None:
        words: list[str] = [condition.status] if condition.status is not None else []
        words += [f"exit code {condition.exit_code}"] if condition.exit_code is not None else []
        words += [f"{name} = {brief(value).strip('`')}" for name, value in (condition.outputs or {}).items()]
        asked[condition.step] = [" and ".join(words)]
    for part in [*(condition.all or []), *(condition.any or [])]:
        for name, words in _asked(part).items():
            asked.setdefault(name, []).extend(words)
    return asked


def _used(step: Step) -> dict[str, list[str]]:
    """Step id -> the outputs of it that this step's templates use."""
    used: dict[str, list[str]] = {}
    for _, value in rendered_values(step):
        if is_template(value):
            for path in sorted(references(value)):
                if path[0] == "steps" and len(path) > 1:
                    name = path[3] if len(path) > 3 and path[2] == "outputs" else path[2] if len(path) > 2 else ""
                    used.setdefault(path[1], []).extend([name] if name else [])
    return used


def _lines(step: Step) -> list[str]:
    lines = [step.name or step.id, step.type]
    if step.matrix is not None:
        sizes = [
            f"{name} {len(values) if isinstance(values, list) else ''}".strip() for name, values in step.matrix.items()
        ]
        lines.append(f"matrix: {' x '.join(sizes)}")
    if step.when is not None and not step.when.steps():
        lines.append("always")
    return lines


def mermaid(plan: Plan) -> str:
    """The plan as a Mermaid flowchart."""
    names = {step.id: f"s{index}" for index, step in enumerate(plan.steps)}
    lines = ["flowchart LR"]
    for step in plan.steps:
        label = "<br/>".join(_mermaid_text(line) for line in _lines(step))
        lines.append(
            f'  {names[step.id]}[["{label}"]]' if step.matrix is not None else f'  {names[step.id]}["{label}"]'
        )
    for edge in edges(plan):
        label = f'|"{_mermaid_text(edge.label)}"|' if edge.label else ""
        lines.append(f"  {names[edge.before]} {'-.->' if edge.dashed else '-->'}{label} {names[edge.after]}")
    return "\n".join(lines) + "\n"


def _mermaid_text(text: str) -> str:
    """Only letters, digits and harmless signs stay; the rest becomes an entity that Mermaid shows as the sign."""
    kept = " _-.,:=/+()'"
    return "".join(sign if sign.isalnum() or sign in kept else f"#{ord(sign)};" for sign in " ".join(text.split()))


def dot(plan: Plan) -> str:
    """The plan as a Graphviz graph."""
    lines = [
        f"digraph {_dot_text([plan.name or 'plan'])} {{",
        "  rankdir=LR;",
        '  node [shape=box, fontname="sans-serif"];',
    ]
    for step in plan.steps:
        more = ", peripheries=2" if step.matrix is not None else ""
        lines.append(f"  {_dot_text([step.id])} [label={_dot_text(_lines(step))}{more}];")
    for edge in edges(plan):
        attributes = [f"label={_dot_text([edge.label])}"] if edge.label else []
        attributes += ["style=dashed"] if edge.dashed else []
        suffix = f" [{', '.join(attributes)}]" if attributes else ""
        lines.append(f"  {_dot_text([edge.before])} -> {_dot_text([edge.after])}{suffix};")
    return "\n".join([*lines, "}"]) + "\n"


def _dot_text(lines: list[str]) -> str:
    escaped = (" ".join(line.split()).replace("\\", "\\\\").replace('"', '\\"') for line in lines)
    return '"' + "\\n".join(escaped) + '"'
