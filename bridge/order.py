"""What a step waits for, and in which order steps can run."""

import heapq
from collections.abc import Iterator, Mapping
from typing import Any

from bridge.expressions import ExpressionError, is_template, references
from bridge.plan import Condition, Plan, Step
from bridge.problems import PlanError, Problem


def rendered_values(step: Step) -> Iterator[tuple[str, Any]]:
    """Every field of a step in which templates are rendered, by the field's name in the model."""
    for name in ("params", "env", "working_dir", "image", "matrix", "resources", "cache", "artifacts"):
        value = getattr(step, name)
        if value is None or value is False or value is True or value in ({}, []):
            continue
        yield name, value if isinstance(value, str | dict | list) else value.model_dump(exclude_defaults=True)
    if step.when is not None:
        yield "when", {str(index): outputs for index, outputs in enumerate(_wanted_outputs(step.when))}


def _wanted_outputs(condition: Condition) -> Iterator[dict[str, Any]]:
    if condition.outputs:
        yield condition.outputs
    for part in [*(condition.all or []), *(condition.any or [])]:
        yield from _wanted_outputs(part)


def template_dependencies(step: Step) -> set[str]:
    """Steps whose results the step's templates use. A template that cannot be read counts as none."""
    found: set[str] = set()
    for _, value in rendered_values(step):
        if is_template(value):
            try:
                found.update(path[1] for path in references(value) if path[0] == "steps" and len(path) > 1)
            except ExpressionError:
                continue
    return found


def dependencies(step: Step) -> set[str]:
    """Ids of the steps that must be decided first: `depends_on`, those `when` looks at, those its templates use."""
    looked_at = step.when.steps() if step.when is not None else set()
    return {*step.depends_on, *looked_at, *template_dependencies(step)}


def waits_for(plan: Plan) -> dict[str, list[str]]:
    """Step id -> the steps of the plan it waits for, both in plan order; unknown and own ids are left out."""
    position = {step.id: index for index, step in enumerate(plan.steps)}
    return {
        step.id: sorted(
            (other for other in dependencies(step) if other in position and other != step.id), key=position.__getitem__
        )
        for step in plan.steps
    }


def topological_order(plan: Plan) -> list[str]:
    """Step ids such that each comes after all it waits for; plan order where that leaves a choice.

    Raises `PlanError` with the cycles when there are some.
    """
    needed = waits_for(plan)
    order = _sorted(needed)
    if len(order) < len(needed):
        raise PlanError([Problem(path="steps", message=cycle_text(cycle)) for cycle in cycles(needed)])
    return order


def _sorted(needed: Mapping[str, list[str]]) -> list[str]:
    names = list(needed)
    position = {name: index for index, name in enumerate(names)}
    missing = {name: len(others) for name, others in needed.items()}
    dependents: dict[str, list[str]] = {name: [] for name in names}
    for name, others in needed.items():
        for other in others:
            dependents[other].append(name)
    ready = [position[name] for name in names if missing[name] == 0]
    order = []
    while ready:
        name = names[heapq.heappop(ready)]
        order.append(name)
        for dependent in dependents[name]:
            missing[dependent] -= 1
            if missing[dependent] == 0:
                heapq.heappush(ready, position[dependent])
    return order


def cycles(needed: Mapping[str, list[str]]) -> list[list[str]]:
    """Cycles that share no step, each from its first step in plan order.

    Each step waits for the next, the last for the first.
    """
    settled = set(_sorted(needed))
    found = []
    for start in needed:
        path: list[str] = []
        on_path: dict[str, int] = {}
        waiting = [(start, 0)]
        while waiting:
            name, depth = waiting.pop()
            # All that is deeper has been followed to its end.
            for ended in path[depth:]:
                del on_path[ended]
                settled.add(ended)
            del path[depth:]
            if name in on_path:
                cycle = path[on_path[name] :]
                settled.update(cycle)
                found.append(cycle)
                break
            if name in settled:
                continue
            on_path[name] = len(path)
            path.append(name)
            waiting.extend((other, depth + 1) for other in reversed(needed[name]))
        else:
            settled.update(path)
    position = {name: index for index, name in enumerate(needed)}
    return [_from_first(cycle, position) for cycle in found]


def _from_first(cycle: list[str], position: Mapping[str, int]) -> list[str]:
    first = min(range(len(cycle)), key=lambda index: position[cycle[index]])
    return cycle[first:] + cycle[:first]


def cycle_text(cycle: list[str]) -> str:
    """`steps wait for each other: a -> b -> a`, in backticks."""
    return f"steps wait for each other: `{' -> '.join([*cycle, cycle[0]])}`"
