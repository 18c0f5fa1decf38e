"""Checks every template of a plan: can it be read, and does it name params, steps and outputs that are there?"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bridge.expressions import (
    ExpressionError,
    check_shell_text,
    is_template,
    optional_references,
    references,
    shell_texts,
)
from bridge.order import rendered_values
from bridge.plan import COMMON_BLOCKS, Plan, Step
from bridge.problems import Finding, Path, listed, nearest_hint
from steps._registry import StepType

ROOTS = ("env", "matrix", "params", "run", "steps")
_STEP_KEYS = ("exit_code", "outcome", "outputs")
_RUN_KEYS = ("attempt", "id")

OutputsOf = Callable[[Step], frozenset[str] | None]


def field_path(index: int, step: Step, *rest: str | int) -> Path:
    """Where a field of the step's type stands in a plan file."""
    return ("steps", index, *rest) if step.type in COMMON_BLOCKS else ("steps", index, step.type, *rest)


def known_outputs(step: Step, step_type: StepType | None) -> frozenset[str] | None:
    """Names a step's outputs can have, or None when nothing is declared."""
    declared = step_type.outputs if step_type is not None else None
    names = {*step.outputs, *(declared.model_fields if declared is not None else ())}
    return frozenset(names) or None


class TemplateChecks:
    """Checks the templates of one plan."""

    def __init__(self, plan: Plan, steps: Mapping[str, Step], outputs_of: OutputsOf) -> None:
        self._plan = plan
        self._steps = steps
        self._outputs_of = outputs_of

    def of_plan(self) -> Iterator[Finding]:
        """Findings for everything but the steps."""
        yield from self._check(("env",), self._plan.env, None, ("params", "run"))
        defaults = self._plan.defaults
        fields = {"env": defaults.env, "working_dir": defaults.working_dir, "image": defaults.image}
        for name, value in fields.items():
            yield from self._check(("defaults", name), value, None, ("params", "run", "env"))
        yield from self._check(("image",), self._plan.image, None, ("params", "run", "env"))
        for name in ("resources", "cache"):
            value = getattr(defaults, name)
            if value is not None and not isinstance(value, bool):
                dumped = value.model_dump(exclude_defaults=True)
                yield from self._check(("defaults", name), dumped, None, ("params", "run", "env"))
        for path, text in ((("log_dir",), self._plan.log_dir), (("name",), self._plan.name)):
            if is_template(text):
                yield _not_rendered(path)
        for name, param in self._plan.params.items():
            if is_template(param.default):
                yield _not_rendered(("params", name, "default"))

    def of_step(self, index: int, step: Step, step_type: StepType | None) -> Iterator[Finding]:
        """Findings for one step."""
        for name, value in rendered_values(step):
            if not is_template(value):
                continue
            if name == "params":
                for key, part in value.items():
                    yield from self._check(field_path(index, step, key), part, step, ROOTS)
            else:
                roots = tuple(root for root in ROOTS if root != "matrix") if name in ("matrix", "when") else ROOTS
                yield from self._check(("steps", index, name), value, step, roots)
        for name in ("id", "name", "depends_on", "outputs", "locks", "secrets"):
            if is_template(getattr(step, name)):
                yield _not_rendered(("steps", index, name))
        if step_type is not None:
            for path, text in shell_texts(step_type.params, step.params):
                try:
                    check_shell_text(text)
                except ExpressionError as error:
                    yield Finding(field_path(index, step, *path), str(error), "pass the value through `env`")

    def _check(self, path: Path, value: Any, step: Step | None, roots: tuple[str, ...]) -> Iterator[Finding]:
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield from self._check((*path, key), item, step, roots)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                yield from self._check((*path, index), item, step, roots)
        elif is_template(value):
            try:
                optional = optional_references(value)
                for reference in sorted(references(value)):
                    fault = self._fault(reference, step, roots, path, reference in optional)
                    if fault is not None:
                        yield Finding(path, f"`{'.'.join(reference)}`: {fault[0]}", fault[1])
            except ExpressionError as error:
                yield Finding(path, str(error))

    def _fault(
        self, reference: tuple[str, ...], step: Step | None, roots: tuple[str, ...], path: Path, optional: bool
    ) -> tuple[str, str] | None:
        """What is wrong with a reference, and a hint."""
        root, rest = reference[0], reference[1:]
        if root not in ROOTS:
            dashed = self._dashed(root)
            return f"there is no `{root}`", dashed or nearest_hint(root, ROOTS, "there are")
        if root not in roots:
            return f"`{root}` cannot be used here", f"here are {listed(roots)}"
        if root == "steps":
            return self._step_fault(rest, step, optional)
        if root == "matrix" and (step is None or step.matrix is None):
            return "the step has no `matrix`", "add one, or use `params`"
        if not rest or optional:
            return None
        known: Any = {
            "params": self._plan.params,
            "matrix": (step.matrix if step is not None else None) or {},
            "env": self._environment(step, path),
            "run": _RUN_KEYS if self._is_of_an_attempt(path) else ("id",),
        }[root]
        if rest[0] in known:
            return None
        noun = {"params": "param", "matrix": "matrix value", "env": "environment variable", "run": "key"}[root]
        hint = nearest_hint(rest[0], list(known), "there are")
        return f"there is no {noun} `{rest[0]}`", hint or f"declare it under `{root}`"

    def _is_of_an_attempt(self, path: Path) -> bool:
        """False where a value is rendered once for the run or the step, before there is an attempt."""
        return path[0] != "env" and path[2:3] not in (("matrix",), ("when",))

    def _environment(self, step: Step | None, path: Path) -> set[str]:
        """Names of the environment at this place: an `env` sees the plan's only."""
        names = set(self._plan.env)
        if path[2:3] != ("env",) and path[:2] != ("defaults", "env"):
            names |= {*self._plan.defaults.env, *(step.env if step is not None else ())}
        return names

    def _step_fault(self, rest: tuple[str, ...], step: Step | None, optional: bool) -> tuple[str, str] | None:
        if not rest:
            return "the step is not written out", "write `steps.ID`: what a step waits for must be known before it runs"
        name = rest[0]
        target = self._steps.get(name)
        if target is None:
            return f"there is no step `{name}`", self._dashed(name) or nearest_hint(name, self._steps, "steps")
        if step is not None and target.id == step.id:
            return "a step cannot use its own results", ""
        if len(rest) > 1 and rest[1] not in _STEP_KEYS:
            outputs = self._outputs_of(target)
            if outputs is None or rest[1] in outputs:
                return f"a step has no `{rest[1]}`", f"did you mean `steps.{name}.outputs.{rest[1]}`?"
            return f"a step has no `{rest[1]}`", nearest_hint(rest[1], _STEP_KEYS, "there are")
        if len(rest) > 2 and rest[1] == "outputs" and not optional:
            outputs = self._outputs_of(target)
            if outputs is not None and rest[2] not in outputs:
                return f"step `{name}` has no output `{rest[2]}`", nearest_hint(rest[2], outputs, "its outputs")
        return None

    def _dashed(self, word: str) -> str:
        """`steps.train-a.outputs` is a subtraction; the id has to be quoted."""
        for name in self._steps:
            if not name.isidentifier() and (name.startswith(f"{word}-") or name.endswith(f"-{word}")):
                return f'write `steps["{name}"]` for an id that is not a plain word'
        return ""


def _not_rendered(path: Path) -> Finding:
    return Finding(path, f"`{path[-1]}`: a template cannot be used here", "write the value out")
