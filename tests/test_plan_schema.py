"""The JSON Schema of a plan file: valid itself, true to what the reader takes and refuses, and of use to an editor."""

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from bridge.document import read_document
from bridge.plan_schema import plan_schema
from bridge.problems import PlanError
from bridge.reader import read_plan_text
from steps._registry import step_types

HERE = Path(__file__).parent
VALID = [
    *sorted((HERE.parent / "examples").glob("*.yaml")),
    HERE / "plans" / "features.yaml",
    HERE / "plans" / "old_pipeline.yaml",
]
VALIDATOR = Draft202012Validator(plan_schema())


def errors(text: str) -> list[Any]:
    return list(VALIDATOR.iter_errors(read_document(text).data))


def test_the_schema_is_a_schema() -> None:
    Draft202012Validator.check_schema(plan_schema())
    assert plan_schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert json.loads(json.dumps(plan_schema())) == plan_schema()


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.name)
def test_valid_plans(path: Path) -> None:
    assert [error.message for error in errors(path.read_text())] == []


def test_every_type_completes_with_its_fields_and_their_meaning() -> None:
    definitions = plan_schema()["$defs"]
    offered = {entry["const"]: entry["description"] for entry in definitions["Step"]["properties"]["type"]["anyOf"]}
    assert offered.keys() == step_types().keys() and all(offered.values())
    for name, step_type in step_types().items():
        properties = definitions[f"type.{name}"]["properties"]
        assert properties.keys() == step_type.params.model_fields.keys()
        assert all(part.get("description") for part in properties.values()), name
    for name in ("Step", "Defaults", "Param", "Resources", "Retry", "Cache"):
        fields = definitions[name]["properties"]
        assert all(part is True or part.get("description") for part in fields.values()), name


@pytest.mark.parametrize(
    "text",
    [
        "steps: []",
        "stpes: [{id: a, type: command, command: ls}]",
        "steps: [{type: command, command: ls}]",
        "steps: [{id: a, type: command}]",
        "steps: [{id: a, type: comand, command: ls}]",
        "steps: [{id: a, type: command, command: ls, timeout: 3}]",
        "steps: [{id: a, type: command, command: ls, params: {}}]",
        "steps: [{id: a, type: command, command: ls, args: text}]",
        "steps: [{id: a, type: command, command: ls, download: {url: 'http://x', output: y}}]",
        "steps: [{id: a, type: download, command: ls, download: {url: 'http://x', output: y}}]",
        "steps: [{id: a, type: download}]",
        "steps: [{id: a, type: download, download: {url: 'http://x'}}]",
        "steps: [{id: a, type: download, download: {url: 'http://x', output: y, sha: z}}]",
        "steps: [{id: a, type: command, command: ls, timeout_seconds: -1}]",
        "steps: [{id: a, type: command, command: ls, when: sometimes}]",
        "steps: [{id: a, type: command, command: ls, retry: {max_attempts: 0}}]",
        "steps: [{id: a, type: command, command: ls, resources: {gpu: 1}}]",
        "steps: [{id: a, type: container_job, container_job: {command: ls, gpu: [1]}}]",
        "params: {a: {type: int}}\nsteps: [{id: a, type: command, command: ls}]",
    ],
)
def test_what_the_schema_refuses_the_reader_refuses_too(text: str) -> None:
    assert errors(text)
    with pytest.raises(PlanError):
        read_plan_text(text, Path("plan.yaml"))


@pytest.mark.parametrize(
    "text",
    [
        "steps: [{id: a, type: command, command: ls, when: always}]",
        "steps: [{id: 1, type: command, command: ls, args: [1, true, 2.5, null], env: {A: 3, B: true, C: }}]",
        "steps: [{id: a, type: container_job, container_job: {command: ls, gpu: '${{ 1 == 1 }}'}}]",
        "steps: [{id: a, type: command, command: ls, cache: true, secrets: {A: b}}]",
        "params: {l: {type: list, default: []}}\n"
        "steps: [{id: a, type: command, command: ls, args: '${{ params.l }}', matrix: {m: '${{ params.l }}'}}]",
    ],
)
def test_what_the_reader_takes_the_schema_takes_too(text: str) -> None:
    read_plan_text(text, Path("plan.yaml"))
    assert [error.message for error in errors(text)] == []
