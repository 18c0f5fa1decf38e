"""What must hold between the fields of a plan. `find_problems` finds all of it at once; nothing here reads a file.

ids -> references -> cycles -> conditions -> templates -> the fields of each step type -> sizes and values
"""

import re
from collections.abc import Iterator
from typing import Any

from bridge.conditions import never_true
from bridge.expressions import is_template, script_position
from bridge.fields import validate
from bridge.order import cycle_text, cycles, dependencies, topological_order, waits_for
from bridge.params import declared_fault, resolve_params
from bridge.plan import Condition, Plan, Step, with_defaults
from bridge.problems import Finding, Path, PlanError, Problem, brief, nearest_hint, path_text
from bridge.scopes import TemplateChecks, field_path, known_outputs
from bridge.shell import python_script
from bridge.values import VARIABLE, common_values, environment, secrets, step_values
from steps._contract import StepError
from steps._registry import StepType, find

__all__ = ["check_plan", "dependencies", "find_problems", "log_name", "resolve_params", "topological_order"]

MAX_STEPS = 20_000
MAX_ID_LENGTH = 100

_RESERVED = {"events.jsonl": "the run's own events"}


def check_plan(plan: Plan, file: str = "") -> tuple[Problem, ...]:
    """Check a plan that was built in Python. Returns its warnings; raises `PlanError` with everything that is wrong."""
    problems = [
        Problem(severity=found.severity, file=file, path=path_text(found.path), message=found.message, hint=found.hint)
        for found in find_problems(plan)
    ]
    if any(problem.severity == "error" for problem in problems):
        raise PlanError(problems)
    return tuple(problems)


def find_problems(plan: Plan) -> list[Finding]:
    """Everything that is wrong with a plan, or doubtful, in no particular order."""
    return list(_Checks(plan).run())


def log_name(step_id: str) -> str:
    """The name of a step's logs."""
    return re.sub(r"[/\\ ]", "_", step_id.strip())


class _Checks:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.steps: dict[str, Step] = {}
        for step in plan.steps:
            self.steps.setdefault(step.id, step)
        self.needed = waits_for(plan)
        self.types: dict[str, tuple[StepType | None, str, str]] = {}
        self.outputs: dict[str, frozenset[str] | None] = {}

    def run(self) -> Iterator[Finding]:
        if len(self.plan.steps) > MAX_STEPS:
            message = f"a plan of {len(self.plan.steps):,} steps, the limit is {MAX_STEPS:,}"
            yield Finding(("steps",), message, "use a `matrix`, or split the plan")
            return
        yield from self._plan_values()
        yield from self._ids()
        templates = TemplateChecks(self.plan, self.steps, self._outputs_of)
        yield from templates.of_plan()
        for index, step in enumerate(self.plan.steps):
            step_type, findings = self._type(index, step)
            yield from findings
            yield from self._references(index, step)
            yield from templates.of_step(index, step, step_type)
            if step_type is not None:
                yield from _params(index, step, step_type)
                yield from _image(index, step, step_type)
            yield from step_values(index, step)
        yield from self._cycles()
        yield from self._actors()

    def _outputs_of(self, step: Step) -> frozenset[str] | None:
        if step.id not in self.outputs:
            self.outputs[step.id] = known_outputs(step, self._load(step.type)[0] if step.type else None)
        return self.outputs[step.id]

    def _load(self, name: str) -> tuple[StepType | None, str, str]:
        if name not in self.types:
            self.types[name] = load_type(name)
        return self.types[name]

    def _type(self, index: int, step: Step) -> tuple[StepType | None, list[Finding]]:
        step_type, message, hint = self._load(step.type)
        return step_type, [] if step_type is not None else [Finding(("steps", index, "type"), message, hint)]

    def _plan_values(self) -> Iterator[Finding]:
        for name, param in self.plan.params.items():
            if not VARIABLE.match(name):
                yield Finding(("params", name), f"param `{name}`: wanted letters, digits and `_`", at_key=True)
            field, fault = declared_fault(param)
            if fault and not is_template(param.default):
                yield Finding(("params", name, field), fault)
        yield from environment(("env",), self.plan.env)
        yield from environment(("defaults", "env"), self.plan.defaults.env)
        yield from secrets(("secrets",), self.plan.secrets)
        yield from secrets(("defaults", "secrets"), self.plan.defaults.secrets)
        yield from common_values(("defaults",), self.plan.defaults)

    def _ids(self) -> Iterator[Finding]:
        seen: dict[str, tuple[int, str]] = {}
        instances = {log_name(step.id).casefold(): step for step in self.plan.steps if step.matrix is not None}
        for index, step in enumerate(self.plan.steps):
            path = ("steps", index, "id")
            fault = _bad_id(step.id)
            if fault:
                yield Finding(path, fault)
                continue
            name = log_name(step.id).casefold()
            if name in seen and seen[name][1] == step.id:
                yield Finding(
                    path, f"duplicate step id `{step.id}`, first used by `steps[{seen[name][0]}]`", "rename one"
                )
            elif name in seen:
                other = seen[name][1]
                yield Finding(
                    path, f"step ids `{step.id}` and `{other}` would share the log name `{name}`", "rename one"
                )
            else:
                seen[name] = (index, step.id)
            base, _, number = name.rpartition(".")
            if number.isdecimal() and base in instances and instances[base] is not step:
                matrix = instances[base].id
                message = f"step id `{step.id}` is also the name of an instance of the matrix step `{matrix}`"
                yield Finding(path, message, "rename one")

    def _references(self, index: int, step: Step) -> Iterator[Finding]:
        for position, other in enumerate(step.depends_on):
            path = ("steps", index, "depends_on", position)
            if other == step.id:
                yield Finding(path, f"step `{step.id}` depends on itself", "remove it")
            elif other not in self.steps:
                yield self._unknown_step(path, f"step `{step.id}` depends on unknown step `{other}`", other)
        if step.when is None:
            return
        findings = list(self._condition(step, step.when, ("steps", index, "when")))
        yield from findings
        if not findings:
            reason = never_true(step.when, self.steps, lambda other: set(self.needed[other.id]))
            if reason is not None:
                message = f"`when` of step `{step.id}` can never be true: {reason}"
                yield Finding(("steps", index, "when"), message, "change the condition, or remove the step")

    def _unknown_step(self, path: Path, message: str, name: str) -> Finding:
        return Finding(path, message, nearest_hint(name, [known for known in self.steps if known], "steps"))

    def _condition(self, step: Step, condition: Condition, path: Path) -> Iterator[Finding]:
        for form in ("all", "any"):
            for index, part in enumerate(getattr(condition, form) or []):
                yield from self._condition(step, part, (*path, form, index))
        name = condition.step
        if name is None:
            return
        if name == step.id:
            yield Finding((*path, "step"), f"`when` of step `{step.id}` looks at the step itself", "name another step")
        elif name not in self.steps:
            yield self._unknown_step(
                (*path, "step"), f"`when` of step `{step.id}` references unknown step `{name}`", name
            )
        elif condition.outputs:
            known = self._outputs_of(self.steps[name])
            for output in condition.outputs:
                if known is not None and output not in known:
                    hint = nearest_hint(output, known, "its outputs")
                    yield Finding(
                        (*path, "outputs", output), f"step `{name}` has no output `{output}`", hint, at_key=True
                    )

    def _actors(self) -> Iterator[Finding]:
        """Steps that name the same actor must ask for the same, or each would get an actor of its own."""
        first: dict[str, tuple[str, object]] = {}
        for index, step in enumerate(with_defaults(self.plan).steps):
            name = step.resources.actor if step.resources is not None else None
            if name is None or is_template(name):
                continue
            other, asked = first.setdefault(name, (step.id, (step.resources, step.image)))
            if asked != (step.resources, step.image):
                message = f"steps `{other}` and `{step.id}` name the actor `{name}` and ask for different things"
                path: Path = ("steps", index, "resources", "actor")
                yield Finding(path, message, "give both the same `resources` and `image`, or another `actor`")

    def _cycles(self) -> Iterator[Finding]:
        position = {step.id: index for index, step in reversed(list(enumerate(self.plan.steps)))}
        for cycle in cycles(self.needed):
            index = position[cycle[0]]
            step, following = self.plan.steps[index], cycle[1 % len(cycle)]
            path: Path = ("steps", index)
            if following in step.depends_on:
                path = (*path, "depends_on", step.depends_on.index(following))
            elif step.when is not None and following in step.when.steps():
                path = (*path, "when")
            yield Finding(path, cycle_text(cycle), "remove one of these dependencies")


def load_type(name: str) -> tuple[StepType | None, str, str]:
    """The step type, or None with a message and a hint."""
    try:
        found = find(name)
    except StepError as error:
        message, _, hint = str(error).partition("\n\nhint: ")
        return None, message, hint
    try:
        found.params  # noqa: B018 - importing a type of another package may fail in any way
    except Exception as error:
        return None, f"step type `{name}` cannot be loaded: {type(error).__name__}: {error}", "reinstall its package"
    return found, "", ""


def _bad_id(step_id: str) -> str:
    name = log_name(step_id)
    if not name:
        return "an empty step id"
    if name in (".", ".."):
        return f"step id `{step_id}` is not a file name"
    if len(step_id) > MAX_ID_LENGTH or len(name.encode("utf-8", "replace")) > 200:
        return f"step id {brief(step_id)} has {len(step_id)} characters, the limit is {MAX_ID_LENGTH}"
    if not step_id.isprintable():
        return f"step id {step_id!r} has a character that cannot be printed"
    if name.casefold() in _RESERVED:
        return f"step id `{step_id}` is the name of {_RESERVED[name.casefold()]}"
    return ""


def _image(index: int, step: Step, step_type: StepType) -> Iterator[Finding]:
    if step.image is not None and step_type.drives_engine:
        own = "image" in step_type.params.model_fields
        hint = f"the image of its containers stands in the block `{step.type}:`" if own else "remove `image`"
        message = f"a `{step.type}` step drives the container engine and cannot run in an image itself"
        yield Finding(("steps", index, "image"), message, hint)


def _params(index: int, step: Step, step_type: StepType) -> Iterator[Finding]:
    """The step's own fields against the model of its type; what has a template is known when the step starts."""
    base = field_path(index, step)
    _, findings = validate(step_type.params, step.params, base)
    for finding in findings:
        value: Any = step.params
        for part in finding.path[len(base) :]:
            value = value.get(part) if isinstance(value, dict) else value[part]
        if not is_template(value):
            yield finding
    for name, field in step_type.params.model_fields.items():
        value = step.params.get(name)
        if field.is_required() and isinstance(value, str) and not value.strip():
            yield Finding((*base, name), f"`{name}` of step `{step.id}` is empty")
    if isinstance(step.params.get("env"), dict) and step.type not in ("command",):
        yield from environment((*base, "env"), step.params["env"])
    yield from _scripts(index, step, step_type)


def _scripts(index: int, step: Step, step_type: StepType) -> Iterator[Finding]:
    args = step.params.get("args")
    if not isinstance(args, list):
        return
    position, hint = script_position(step_type.params, step.params), 'use `"$NAME"` in the script'
    if position is None:
        found = python_script([step.params.get("command"), *args])
        position, hint = found - 1 if found is not None else None, "use `os.environ` in the script"
    if position is not None and is_template(args[position]):
        yield Finding(
            field_path(index, step, "args", position),
            f"step `{step.id}` puts a template into the script of `-c`",
            f"pass the value through `env`, and {hint}",
            "warning",
        )
