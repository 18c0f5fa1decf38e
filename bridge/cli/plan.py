"""Commands about plans and step types that start nothing: `validate`, `graph`, `schema`, `steps`."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from bridge.params import resolve_params
from bridge.plan import COMMON_BLOCKS, DEFAULT_TIMEOUT_S
from bridge.problems import PlanError, Problem, nearest_hint
from bridge.reader import LoadedPlan, read_any
from steps._registry import StepType, step_types

INVALID = 2
"""Exit code of an invalid plan, and of wrong usage."""


def parse_params(texts: tuple[str, ...]) -> dict[str, str]:
    """`("a=1", "b=2")` as a dict. Raises `click.UsageError`."""
    given = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise click.UsageError(f"`-p {text}`: wanted `-p name=value`")
        given[name.strip()] = value
    return given


def load_or_exit(path: Path) -> LoadedPlan:
    """The plan; on an invalid one every problem goes to stderr and the program ends with 2."""
    try:
        return read_any(path)
    except PlanError as error:
        click.echo(str(error), err=True)
        sys.exit(INVALID)


@click.command()
@click.argument("plans", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PLAN...")
@click.option("-p", "--param", "params", multiple=True, metavar="NAME=VALUE", help="Check this value as well.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def validate(plans: tuple[Path, ...], params: tuple[str, ...], as_json: bool) -> None:
    """Check plans and start nothing. Exit code 2 when one is not valid."""
    given = parse_params(params)
    results = [_validated(path, given) for path in plans]
    if as_json:
        click.echo(json.dumps(results if len(results) > 1 else results[0], indent=2, ensure_ascii=False))
    else:
        for result in results:
            _print_result(result)
    if not all(result["valid"] for result in results):
        sys.exit(INVALID)


def _validated(path: Path, given: dict[str, str]) -> dict[str, Any]:
    steps = 0
    try:
        loaded = read_any(path)
        steps, problems = len(loaded.plan.steps), loaded.warnings
        if given:
            resolve_params(loaded.plan, given)
    except PlanError as error:
        problems = error.problems
    valid = not any(problem.severity == "error" for problem in problems)
    found = [problem.model_dump() | {"file": problem.file or str(path)} for problem in problems]
    return {"file": str(path), "valid": valid, "steps": steps, "problems": found}


def _print_result(result: dict[str, Any]) -> None:
    for problem in result["problems"]:
        click.echo(str(Problem(**problem)), err=True)
    if result["valid"]:
        count = result["steps"]
        click.echo(f"{result['file']}: valid, {count} {'step' if count == 1 else 'steps'}")
    else:
        errors = sum(problem["severity"] == "error" for problem in result["problems"])
        click.echo(f"{result['file']}: {errors} {'error' if errors == 1 else 'errors'}", err=True)


@click.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(["mermaid", "dot"]), default="mermaid", show_default=True)
def graph(plan: Path, form: str) -> None:
    """Draw a plan: its steps and what each waits for."""
    from bridge.graph import dot, mermaid

    loaded = load_or_exit(plan)
    click.echo({"mermaid": mermaid, "dot": dot}[form](loaded.plan), nl=False)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Write here instead of printing.")
def schema(output: Path | None) -> None:
    """Print the JSON Schema of a plan file, for editors."""
    from bridge.plan_schema import plan_schema

    text = json.dumps(plan_schema(), indent=2, ensure_ascii=False) + "\n"
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        _write(output, text)
    except OSError as error:
        raise click.UsageError(f"cannot write `{output}`: {error.strerror}") from None


def _write(path: Path, text: str) -> None:
    """Write the file whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the types as JSON, with the schema of each.")
def steps(name: str | None, as_json: bool) -> None:
    """List the step types, or the fields of one."""
    types = step_types()
    if name is not None and name not in types:
        hint = nearest_hint(name, types, "step types")
        raise click.UsageError(f"unknown step type `{name}`\n\nhint: {hint}")
    chosen = [types[name]] if name is not None else list(types.values())
    if as_json:
        described = [_described(step_type) for step_type in chosen]
        click.echo(json.dumps(described[0] if name is not None else described, indent=2, ensure_ascii=False))
    elif name is not None:
        _print_type(chosen[0])
    else:
        width = max(len(step_type.name) for step_type in chosen)
        for step_type in chosen:
            click.echo(f"{step_type.name:<{width}}  {step_type.summary}")
            click.echo(f"{'':<{width}}  fields: {', '.join(_signature(field) for field in _fields(step_type))}")


def _fields(step_type: StepType) -> list[dict[str, Any]]:
    schema = step_type.params.model_json_schema()
    return [
        {
            "name": name,
            "type": type_text(part, schema.get("$defs", {})),
            "required": name in schema.get("required", []),
            "default": part.get("default"),
            "description": " ".join(part.get("description", "").split()),
        }
        for name, part in schema.get("properties", {}).items()
    ]


def _described(step_type: StepType) -> dict[str, Any]:
    outputs = step_type.outputs
    return {
        "name": step_type.name,
        "summary": step_type.summary,
        "inline": step_type.name in COMMON_BLOCKS,
        "fields": _fields(step_type),
        "outputs": sorted(outputs.model_fields) if outputs is not None else [],
        "schema": step_type.params.model_json_schema(),
    }


def type_text(part: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON Schema type in words: `text`, `list of text`, `map of text`, ..."""
    if "$ref" in part:
        part = definitions.get(part["$ref"].rpartition("/")[2], {})
    if "enum" in part or "const" in part:
        return " | ".join(str(value) for value in part.get("enum", [part.get("const")]))
    if "anyOf" in part:
        return " | ".join(type_text(arm, definitions) for arm in part["anyOf"] if arm.get("type") != "null")
    kind = part.get("type", "any")
    if kind == "array":
        return f"list of {type_text(part.get('items', {}), definitions)}"
    if kind == "object":
        inner = part.get("additionalProperties")
        return f"map of {type_text(inner, definitions)}" if isinstance(inner, dict) else "mapping"
    return {"string": "text", "integer": "integer", "number": "number", "boolean": "true | false"}.get(kind, "any")


def _signature(field: dict[str, Any]) -> str:
    return f"{field['name']}*" if field["required"] else str(field["name"])


def _print_type(step_type: StepType) -> None:
    click.echo(f"{step_type.name}: {step_type.summary}\n")
    where = "on the step itself" if step_type.name in COMMON_BLOCKS else f"in a block `{step_type.name}:`"
    click.echo(f"Fields, {where}:")
    fields = _fields(step_type)
    width = max((len(field["name"]) for field in fields), default=0)
    for field in fields:
        value = "required" if field["required"] else f"default {json.dumps(field['default'], ensure_ascii=False)}"
        click.echo(f"  {field['name']:<{width}}  {field['type']}, {value}")
        if field["description"]:
            click.echo(f"  {'':<{width}}  {field['description']}")
    outputs = step_type.outputs
    if outputs is not None:
        click.echo("Outputs:")
        for name, info in outputs.model_fields.items():
            description = " ".join((info.description or "").split())
            click.echo(f"  {name}  {description}".rstrip())
    click.echo(
        f"Every step also has `env`, `working_dir`, `timeout_seconds` (default {DEFAULT_TIMEOUT_S}) and the like."
    )


COMMANDS: tuple[click.Command, ...] = (validate, graph, schema, steps)
