"""A plan file -> a checked `Plan`: strict YAML, the models, the checks; every problem with its line and column.

read_document -> _PlanReader (fields of the plan, each step, its block) -> find_problems -> LoadedPlan or PlanError
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.checks import find_problems, load_type
from bridge.document import MAX_BYTES, Document, Node, read_document
from bridge.fields import convert, unknown_key, validate
from bridge.plan import COMMON_BLOCKS, Plan, Step
from bridge.problems import Finding, PlanError, Problem, describe, listed, nearest, path_text
from bridge.problems import Path as PlanPath
from steps._registry import StepType, step_types

__all__ = [
    "LoadedPlan",
    "PlanError",
    "Problem",
    "is_old_list",
    "read_any",
    "read_plan",
    "read_plan_text",
    "read_steps_json",
    "read_steps_json_text",
]

_STEP_KEYS = tuple(name for name in Step.model_fields if name != "params")


@dataclass(frozen=True)
class LoadedPlan:
    """A valid plan and where it came from."""

    plan: Plan
    path: Path
    """Absolute; relative paths of the plan start at its folder."""
    warnings: tuple[Problem, ...] = ()


def read_plan(path: Path) -> LoadedPlan:
    """Read and check a plan file. Raises `PlanError` with every problem found."""
    return read_plan_text(read_text(path), path)


def read_plan_text(text: str, path: Path) -> LoadedPlan:
    """Read and check the text of a plan; `path` is where it stands or would stand. Raises `PlanError`."""
    file = str(path)
    document = read_document(text.removeprefix("\ufeff"))
    problems = [_problem(finding, file, (line, column)) for finding, line, column in document.findings]
    if not document.complete:
        raise PlanError(problems)
    reader = _PlanReader(document)
    plan = reader.read(path.stem)
    problems += [_problem(found, file, document.root.place(found.path, found.at_key)) for found in reader.findings]
    if plan is not None:
        problems += [
            _problem(found, file, document.root.place(found.path, found.at_key))
            for found in find_problems(plan)
            if not reader.reported_above(found)
        ]
    problems.sort(key=lambda problem: (problem.line, problem.column))
    if plan is None or any(problem.severity == "error" for problem in problems):
        raise PlanError(tuple(dict.fromkeys(problems)))
    return LoadedPlan(plan, path.absolute(), tuple(problems))


def read_any(path: Path) -> LoadedPlan:
    """Read a plan or, from a `.json` file, the old list. Raises `PlanError`."""
    if path.suffix != ".json":
        return read_plan(path)
    text = read_text(path)
    return read_steps_json_text(text, path) if is_old_list(text) else read_plan_text(text, path)


def is_old_list(text: str) -> bool:
    """True for the text of an old list of steps, which have neither `id` nor `type`."""
    data = read_document(text.removeprefix("\ufeff")).data
    steps = data.get("steps") if isinstance(data, dict) else data
    return isinstance(steps, list) and not any(
        isinstance(step, dict) and {"id", "type"} & step.keys() for step in steps
    )


def read_steps_json(path: Path) -> LoadedPlan:
    """Read the old sequential list of steps (`run -input steps.json`). Raises `PlanError`."""
    return read_steps_json_text(read_text(path), path)


def read_steps_json_text(text: str, path: Path) -> LoadedPlan:
    """Read the text of an old sequential list of steps; `path` is where it stands. Raises `PlanError`."""
    from bridge.legacy import plan_of_list

    text, file = text.removeprefix("\ufeff"), str(path)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        message = f"not JSON: {error.msg}"
        raise PlanError([Problem(file=file, line=error.lineno, column=error.colno, message=message)]) from None
    except RecursionError:
        raise PlanError([Problem(file=file, message="nested too deeply")]) from None
    # JSON is nearly YAML; where it is not, only the places are less exact.
    root = read_document(text).root
    if isinstance(data, list):
        items, root = root, Node(root.line, root.column)
        data, root.entries["steps"] = {"steps": data}, items
    plan, findings = plan_of_list(data, root, path.stem)
    if plan is not None:
        findings = [found for found in find_problems(plan) if found.severity == "error"]
    if plan is None or findings:
        raise PlanError([_problem(found, file, root.place(found.path, found.at_key)) for found in findings])
    return LoadedPlan(plan, path.absolute())


def read_text(path: Path) -> str:
    """The text of a plan file. Raises `PlanError` when it cannot be read, is too large or is not UTF-8."""
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        hint = "give the path of a plan file" if isinstance(error, FileNotFoundError | IsADirectoryError) else ""
        raise PlanError([Problem(file=str(path), message=f"cannot read the plan: {reason}", hint=hint)]) from None
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start]
        if len(content) > MAX_BYTES:
            return before.decode()
        line = before.count(b"\n") + 1
        column = len(before.rpartition(b"\n")[2].decode("utf-8", "replace")) + 1
        message = f"not UTF-8: byte 0x{content[error.start]:02x}"
        problem = Problem(file=str(path), line=line, column=column, message=message, hint="save the file as UTF-8")
        raise PlanError([problem]) from None


def _problem(finding: Finding, file: str, place: tuple[int, int]) -> Problem:
    line, column = place
    return Problem(
        severity=finding.severity,
        file=file,
        line=line,
        column=column,
        path=path_text(finding.path),
        message=finding.message,
        hint=finding.hint,
    )


class _PlanReader:
    """Builds the plan from the data of a document, and goes on after a fault with what is left."""

    def __init__(self, document: Document) -> None:
        self._data = document.data
        self._root = document.root
        self._types: dict[str, StepType | None] = {}
        self.findings: list[Finding] = []
        self._reported: set[PlanPath] = set()

    def report(self, finding: Finding) -> None:
        self.findings.append(finding)
        if finding.severity == "error":
            self._reported.add(finding.path)

    def reported_above(self, finding: Finding) -> bool:
        """True when the value of a finding, or what contains it, is already known to be wrong."""
        return any(finding.path[:length] in self._reported for length in range(1, len(finding.path) + 1))

    def read(self, default_name: str) -> Plan | None:
        """The plan, perhaps with steps that could not be read left empty; None when there is nothing to check."""
        if not isinstance(self._data, dict):
            what = "the plan is empty" if self._data is None else f"got {describe(self._data)}, wanted a mapping"
            self.report(Finding((), what, "a plan starts with `steps:`"))
            return None
        own = {key: value for key, value in self._data.items() if key != "steps"}
        fields = convert(Plan, own, self._root, (), self.report)
        steps = self._steps(self._data.get("steps"))
        _, faults = validate(Plan, {**fields, "steps": [_EMPTY_STEP]}, ())
        for fault in faults:
            self.report(fault)
            if fault.path[0] == "params" and len(fault.path) > 1:
                fields["params"][fault.path[1]] = {}
            else:
                fields.pop(str(fault.path[0]), None)
        if steps is None:
            return None
        plan: Plan = Plan.model_validate({**fields, "steps": steps or [_EMPTY_STEP]})
        return plan if plan.name else plan.model_copy(update={"name": default_name})

    def _steps(self, raw: Any) -> list[Step] | None:
        node = self._root.child("steps")
        if raw is None:
            at = ("steps",) if node is not None else ()
            self.report(Finding(at, "missing `steps`", "a plan needs at least one step"))
            return None
        if not isinstance(raw, list):
            self.report(
                Finding(("steps",), f"`steps`: got {describe(raw)}, wanted a list", "begin each step with `- id:`")
            )
            return None
        if not raw:
            self.report(Finding(("steps",), "`steps` is empty", "a plan needs at least one step"))
        return [self._step(index, value, node.child(index) if node else None) for index, value in enumerate(raw)]

    def _step(self, index: int, raw: Any, node: Node | None) -> Step:
        path: PlanPath = ("steps", index)
        if not isinstance(raw, dict):
            self.report(
                Finding(path, f"`steps[{index}]`: got {describe(raw)}, wanted a mapping", "begin it with `- id:`")
            )
            return _EMPTY_STEP
        step_type = self._type(raw.get("type"))
        common, own = self._split(raw, step_type, path)
        fields = convert(Step, common, node, path, self.report)
        if step_type is not None:
            fields["params"] = self._params(raw, own, step_type, node, path)
        step, faults = validate(Step, fields, path)
        for fault in faults:
            self.report(fault)
            fields.pop(str(fault.path[2]), None) if len(fault.path) > 2 else None
        if step is None:
            step, _ = validate(Step, {"id": "", "type": "", **fields}, path)
        return step or _EMPTY_STEP

    def _type(self, name: Any) -> StepType | None:
        """The type when it is known and can be loaded; what is wrong with it is found by the checks."""
        if not isinstance(name, str):
            return None
        if name not in self._types:
            self._types[name] = load_type(name)[0]
        return self._types[name]

    def _split(self, raw: dict[str, Any], step_type: StepType | None, path: PlanPath) -> tuple[dict[str, Any], Any]:
        """The common fields, and the fields of the type: its block, or those that stand on the step itself."""
        name = step_type.name if step_type is not None else ""
        inline = name in COMMON_BLOCKS
        type_fields = step_type.params.model_fields if step_type is not None else {}
        common: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key, value in raw.items():
            if key in _STEP_KEYS:
                common[key] = value
            elif inline and key in type_fields:
                own[key] = value
            elif key != name or inline:
                self._misplaced(key, raw, step_type, (*path, key))
        return common, own if inline else raw.get(name)

    def _misplaced(self, key: str, raw: dict[str, Any], step_type: StepType | None, path: PlanPath) -> None:
        if step_type is None:
            if key == raw.get("type") or key in step_types() or key in ("args", "params"):
                return
            self.report(unknown_key(path, [*_STEP_KEYS, *step_types()]))
            return
        name, fields = step_type.name, step_type.params.model_fields
        if name not in COMMON_BLOCKS and key in fields:
            hint = f"write it inside the block `{name}:`"
            self.report(Finding(path, f"unknown key `{key}` beside `{name}`", hint, at_key=True))
        elif key in step_types():
            message = f"block `{key}` on a step of type `{name}`"
            hint = f"write `type: {key}`, or remove the block"
            self.report(Finding(path, message, hint, at_key=True))
        else:
            known = [*_STEP_KEYS, *(fields if name in COMMON_BLOCKS else (name,))]
            hint = ""
            if nearest(key, known) is None and name not in COMMON_BLOCKS and (close := nearest(key, fields)):
                hint = f"did you mean `{close}`, inside the block `{name}:`?"
            elif key == "params":
                hint = f"write the fields of `{name}` " + (
                    "on the step" if name in COMMON_BLOCKS else f"in a block `{name}:`"
                )
            self.report(unknown_key(path, known, hint))

    def _params(
        self, raw: dict[str, Any], own: Any, step_type: StepType, node: Node | None, path: PlanPath
    ) -> dict[str, Any]:
        name = step_type.name
        if name in COMMON_BLOCKS:
            return dict(convert(step_type.params, own, node, path, self.report))
        if own is None:
            required = [field for field, info in step_type.params.model_fields.items() if info.is_required()]
            if required:
                self._reported.add((*path, name))
                self.findings.append(
                    Finding((*path, name), f"missing block `{name}`", f"it needs {listed(required)}", at_key=True)
                )
            return {}
        if not isinstance(own, dict):
            self.report(Finding((*path, name), f"`{name}`: got {describe(own)}, wanted a mapping"))
            return {}
        block = node.child(name) if node is not None else None
        return dict(convert(step_type.params, own, block, (*path, name), self.report))


_EMPTY_STEP = Step(id="", type="")
