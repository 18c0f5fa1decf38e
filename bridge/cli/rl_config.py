"""What `orchestrate rl train` and `rl bench` are asked for: a config file, flags over it, every fault with its place.

--config FILE (YAML) -+
--set a.b=value ------+-> one mapping -> a config, or a Failure with all that is wrong
--model, --task ... --+
"""

from pathlib import Path
from typing import Any, TypeVar

import click

from bridge.cli.failure import Failure
from bridge.document import MAX_BYTES, Node, read_document
from bridge.fields import convert, validate
from bridge.problems import Finding, Problem, path_text
from bridge.problems import Path as Place
from rl.config import RunConfig
from rl.types import Frozen, Task

Config = TypeVar("Config", bound=Frozen)
Given = dict[Place, tuple[str, Any]]
"""Place in the config -> the flag that says so, and its value. Later ones win."""


class TaskLabel(click.ParamType[Task]):
    """A task as tables name it: `simple`, `compositional/hard`, `recursive/2`."""

    name = "task"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Task:
        """Read the label; the nearest name where there is no such task."""
        if isinstance(value, Task):
            return value
        name, _, detail = str(value).partition("/")
        field: dict[str, Any] = {}
        if detail:
            field = {"max_depth": int(detail)} if detail.isdecimal() else {"difficulty": detail}
        task, faults = validate(Task, {"name": name, **field}, ())
        if task is None:
            hint = f" ({faults[0].hint})" if faults[0].hint else ""
            self.fail(f"`{value}`: {_message(faults[0])}{hint}", param, ctx)
        found: Task = task
        return found


def setting(text: str) -> tuple[Place, Any]:
    """`learner.loss.name=cispo` as a place and a value, which is read as in the config file. Raises `Failure`."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise Failure(
            f"`--set {text}`: got no value, wanted `name=value`", "for example `--set learner.loss.name=grpo`"
        )
    document = read_document(f"value: {value}\n")
    if document.findings or not isinstance(document.data, dict) or "value" not in document.data:
        reason = document.findings[0][0].message if document.findings else "not a value"
        raise Failure(f"`--set {text}`: {reason}")
    return tuple(name.split(".")), document.data["value"]


def run_config(file: Path | None, given: Given, base: dict[str, Any] | None = None) -> RunConfig:
    """The config of a training run, as `read_config` reads it."""
    return read_config(RunConfig, file, given, base)


def read_config(kind: type[Config], file: Path | None, given: Given, base: dict[str, Any] | None = None) -> Config:
    """A config of this kind. `base` is what holds where neither file nor flags say anything.

    Raises `Failure` with every fault: of the file with line and column, of a flag with its name.
    """
    data, root, problems = _read(file) if file is not None else ({}, Node(0, 0), [])
    found: list[Finding] = []
    data = convert(kind, data, root, (), found.append)
    merged = _merged(base or {}, data)
    for place, (_, value) in given.items():
        merged = _merged(merged, _nested(place, value))
    # Once more, for what the flags brought.
    merged = convert(
        kind, merged, None, (), lambda finding: None if _in_file(finding, found) else found.append(finding)
    )
    config, faults = validate(kind, merged, ())
    found += faults
    problems += [_problem(finding, file, root, given) for finding in found]
    if config is None or problems:
        raise Failure("the config is not valid\n" + "\n".join(str(problem) for problem in dict.fromkeys(problems)))
    valid: Config = config
    return valid


def _read(file: Path) -> tuple[dict[str, Any], Node, list[Problem]]:
    try:
        content = file.read_bytes()
        text = content.decode().removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror or str(error)
        raise Failure(f"cannot read the config `{file}`: {reason}", "give the path of a YAML file") from None
    if len(content) > MAX_BYTES:
        raise Failure(f"cannot read the config `{file}`: got {len(content)} bytes, wanted at most {MAX_BYTES}")
    document = read_document(text)
    problems = [
        Problem(file=str(file), line=line, column=column, message=finding.message, hint=finding.hint)
        for finding, line, column in document.findings
    ]
    if document.data is not None and not isinstance(document.data, dict):
        problems.append(Problem(file=str(file), line=1, column=1, message="wanted a mapping of settings"))
    if not document.complete or not isinstance(document.data, dict | None):
        raise Failure("the config is not valid\n" + "\n".join(str(problem) for problem in problems))
    return document.data or {}, document.root, problems


def _problem(finding: Finding, file: Path | None, root: Node, given: Given) -> Problem:
    message = _message(finding)
    for place, (flag, _) in reversed(given.items()):
        if finding.path[: len(place)] == place or (finding.at_key and place[: len(finding.path)] == finding.path):
            return Problem(message=f"`{flag}`: {message}", hint=finding.hint)
    if file is None:
        return Problem(message=message, hint=finding.hint)
    line, column = root.place(finding.path, finding.at_key)
    path = path_text(finding.path)
    return Problem(file=str(file), line=line, column=column, path=path, message=message, hint=finding.hint)


def _message(finding: Finding) -> str:
    """Without the name of the whole, which is no plan here."""
    return finding.message.removeprefix("`plan`: ")


def _in_file(finding: Finding, found: list[Finding]) -> bool:
    return any(finding.path == one.path for one in found)


def _nested(place: Place, value: Any) -> dict[str, Any]:
    for part in reversed(place):
        value = {str(part): value}
    nested: dict[str, Any] = value
    return nested


def _merged(below: dict[str, Any], above: Any) -> dict[str, Any]:
    """Mappings are merged, everything else is replaced."""
    if not isinstance(above, dict):
        return below
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
