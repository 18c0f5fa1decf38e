"""JSON Schema of a plan file, so that editors complete and check plans while they are written.

Made from the models: `Plan` for what every plan has, and the `Params` of each step type for its block.
"""

from typing import Any

from bridge.plan import COMMON_BLOCKS, Plan
from steps._registry import StepType, step_types

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]

_TEMPLATE: Schema = {"type": "string", "pattern": r"\$\{\{"}


def plan_schema() -> Schema:
    """The schema of a plan file, with every step type that is installed."""
    schema = Plan.model_json_schema()
    definitions: dict[str, Schema] = {name: _tidy(part) for name, part in schema.pop("$defs").items()}
    definitions["Condition"] = {
        "description": "When the step runs.",
        "anyOf": [{"const": "always"}, definitions["Condition"]],
    }
    for name, part in definitions["Defaults"]["properties"].items():
        part.setdefault("description", definitions["Step"]["properties"][name].get("description", ""))
    types = step_types()
    for step_type in types.values():
        definitions.update(_params_definitions(step_type))
    definitions["Step"] = _step(definitions["Step"], types, definitions)
    plan = _tidy(schema)
    plan["properties"]["defaults"] = {
        "description": "Values for steps that do not set their own.",
        "$ref": "#/$defs/Defaults",
    }
    return {"$schema": DIALECT, "title": "Plan", **plan, "$defs": definitions}


def _params_definitions(step_type: StepType) -> dict[str, Schema]:
    """The type's own fields, and the models inside them under names of their own."""
    prefix = f"{step_type.name}."
    schema = step_type.params.model_json_schema(ref_template=f"#/$defs/{prefix}{{model}}")
    inner = schema.pop("$defs", {})
    own = {**_with_templates(_tidy(schema)), "description": step_type.summary}
    return {_name(step_type): own, **{f"{prefix}{name}": _with_templates(_tidy(part)) for name, part in inner.items()}}


def _name(step_type: StepType) -> str:
    return f"type.{step_type.name}"


def _step(step: Schema, types: dict[str, StepType], definitions: dict[str, Schema]) -> Schema:
    """Common fields and all blocks as properties, so that they complete; the rules by type then forbid the others."""
    common = {name: part for name, part in step["properties"].items() if name != "params"}
    common["type"] = {
        "description": "What the step does.",
        "anyOf": [{"const": name, "description": found.summary} for name, found in types.items()],
    }
    own = {name: _own_properties(found, definitions) for name, found in types.items()}
    everything = {name: part for properties in own.values() for name, part in properties.items()}
    rules = []
    for name, found in types.items():
        forbidden = {other: False for other in everything if other not in own[name]}
        required = definitions[_name(found)].get("required", [])
        needed = required if name in COMMON_BLOCKS else [name] if required else []
        then: Schema = {"properties": {**forbidden, **own[name]}}
        rules.append(
            {
                "if": {"properties": {"type": {"const": name}}, "required": ["type"]},
                "then": {**then, "required": needed} if needed else then,
            }
        )
    return {**step, "properties": {**common, **dict.fromkeys(everything, True)}, "allOf": rules}


def _own_properties(step_type: StepType, definitions: dict[str, Schema]) -> Schema:
    if step_type.name in COMMON_BLOCKS:
        return dict(definitions[_name(step_type)]["properties"])
    return {step_type.name: {"$ref": f"#/$defs/{_name(step_type)}"}}


def _tidy(schema: Schema) -> Schema:
    """Without the titles pydantic invents; a number is accepted where a text is wanted, as the reader does."""
    tidy: Schema = {}
    for key, value in schema.items():
        if key == "title":
            continue
        if key in ("properties", "$defs"):
            tidy[key] = {name: _tidy(part) for name, part in value.items()}
        elif key == "items" or (key == "additionalProperties" and isinstance(value, dict)):
            tidy[key] = _scalar(_tidy(value))
        elif key in ("anyOf", "oneOf", "allOf"):
            tidy[key] = [_tidy(part) for part in value]
        else:
            tidy[key] = value
    if tidy.get("type") == "string" and not {"enum", "const", "pattern"} & tidy.keys():
        tidy["type"] = ["string", "number"]
    return tidy


def _scalar(schema: Schema) -> Schema:
    """In lists and maps of texts every scalar is a text."""
    return {**schema, "type": ["string", "number", "boolean", "null"]} if "string" in schema.get("type", "") else schema


def _with_templates(schema: Schema) -> Schema:
    """Every field of a step type may be a template that renders to what the field wants."""
    if "properties" in schema:
        fields = {name: _or_template(part) for name, part in schema["properties"].items()}
        schema = {**schema, "properties": fields}
    return schema


def _or_template(schema: Schema) -> Schema:
    """The same schema, or a template in its place and in the place of its items."""
    inner = dict(schema)
    for key in ("items", "additionalProperties"):
        if isinstance(inner.get(key), dict):
            inner[key] = _or_template(inner[key])
    if not inner or "string" in inner.get("type", ""):
        return inner
    outer: Schema = {key: inner.pop(key) for key in ("description", "default") if key in inner}
    return {**outer, "anyOf": [inner, _TEMPLATE]}
