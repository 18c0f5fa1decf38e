"""What the result of a step depends on, as fields that people can read and a digest that machines look up.

    StepRequest, Cache, image -> key_fields -> {"params.url": ..., "inputs.data/a.csv": ...} -> digest

Left out because they do not change a result: timeout, retry, log folder, run ids, names. Values of secrets never get
here. Paths inside the plan's folder are relative to it, so a plan that is moved keeps its cache; only a step that names
no input, no artifact and no code of the plan's own is bound to the folder it ran for.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from bridge.file_hash import FileHasher, text_hash
from bridge.local_imports import with_local_imports
from bridge.plan import Cache
from steps import StepError, StepRequest
from steps._environment import node_environment
from steps._file_patterns import matching
from steps._registry import StepType, find

FORMAT = 1
"""Part of every digest; another number when fields get another meaning."""
LONGEST_TEXT = 100
"""Characters; a longer value is shown by its beginning and its hash."""
LISTED_FILES = 500
"""Files of one input that get a field each; more of them share one field."""
_MAX_DEPTH = 3
_PLAN_DIR = "<plan>"
_FORGETFUL = FileHasher()


def key_fields(
    request: StepRequest,
    cache: Cache,
    *,
    image: str,
    image_digest: str = "",
    resources: Mapping[str, Any] | None = None,
    hasher: FileHasher = _FORGETFUL,
) -> dict[str, str]:
    """Everything the step's result depends on, by field name.

    `hasher` is `StepCache.hasher`, so that large inputs are not read again. Raises `StepError` for params the step type
    refuses, an input that cannot be read, or too many of them.
    """
    plan_dir = Path(request.plan_dir)
    step_type = find(request.type)
    fields = {
        "type": request.type,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "working_dir": _relative(request.working_dir, request.plan_dir),
    }
    asked = {name: value for name, value in (resources or {}).items() if value not in (None, {})}
    for name, values in (("params", request.params), ("env", request.env), ("resources", asked)):
        if values:
            fields.update(_flat(name, values, request.plan_dir, _MAX_DEPTH))
    fields.update({f"secrets.{variable}": name for variable, name in request.secrets.items()})
    if image:
        fields["image"] = f"{image} {image_digest}".strip()
    if cache.version:
        fields["version"] = _short(cache.version)
    if request.expected_outputs:
        fields["outputs"] = _short(json.dumps(sorted(request.expected_outputs)))
    if cache.artifacts:
        fields["artifacts"] = _short(json.dumps(sorted(cache.artifacts)))
    fields |= {f"identities.{name}": text for name, text in _identities(step_type, request, plan_dir)}
    try:
        content = dict(_code_files(step_type, request, plan_dir, hasher))
        for pattern in cache.inputs:
            content.update(_input(plan_dir, pattern, hasher))
        fields[f"code.{step_type.module_name}"] = hasher.hash(step_type.source)
    except OSError as error:
        raise StepError(f"step `{request.step_id}` cannot be looked up in the cache: {error}") from error
    if not content and not cache.artifacts:
        # Nothing else tells `make` in one project from `make` in another.
        fields["plan_dir"] = request.plan_dir
    return dict(sorted({**fields, **content}.items()))


def digest(fields: Mapping[str, str]) -> str:
    """64 hex digits that are the same for the same fields, whatever their order."""
    text = json.dumps([FORMAT, sorted(fields.items())], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _identities(step_type: StepType, request: StepRequest, plan_dir: Path) -> Iterator[tuple[str, str]]:
    identities = getattr(step_type.module, "identities", None)
    if identities is not None:
        found = identities(_params(step_type, request), plan_dir, {**node_environment(), **request.env})
        yield from ((name, text) for name, text in found.items() if text)


def _code_files(
    step_type: StepType, request: StepRequest, plan_dir: Path, hasher: FileHasher
) -> Iterator[tuple[str, str]]:
    code_files = getattr(step_type.module, "code_files", None)
    if code_files is None:
        return
    params = _params(step_type, request)
    files = [path for folder in {plan_dir, Path(request.working_dir)} for path in code_files(params, folder)]
    for path in with_local_imports(files, plan_dir):
        name = path.relative_to(plan_dir) if path.is_relative_to(plan_dir) else path
        yield f"code.{name.as_posix()}", hasher.hash(path)


def _params(step_type: StepType, request: StepRequest) -> BaseModel:
    try:
        return step_type.params.model_validate(request.params)
    except ValidationError as error:
        raise StepError(f"step `{request.step_id}` has params that `{request.type}` refuses: {error}") from None


def _input(plan_dir: Path, pattern: str, hasher: FileHasher) -> Iterator[tuple[str, str]]:
    files = matching(plan_dir, pattern)
    shown = _relative(pattern, str(plan_dir)).removeprefix(f"{_PLAN_DIR}/")
    if not files:
        yield f"inputs.{shown} (no file)", "none"
    elif len(files) <= LISTED_FILES:
        yield from ((f"inputs.{name}", hasher.hash(path)) for name, path in files)
    else:
        hashes = [[name, hasher.hash(path)] for name, path in files]
        yield f"inputs.{shown}", f"{len(files)} files {text_hash(json.dumps(hashes))}"


def _flat(name: str, value: Any, plan_dir: str, depth: int) -> Iterator[tuple[str, str]]:
    """One field per value; what is deep, or has names that would be ambiguous, is one field as JSON."""
    if isinstance(value, dict) and value and depth and not any("." in key or not key for key in value):
        for key, item in value.items():
            yield from _flat(f"{name}.{key}", item, plan_dir, depth - 1)
    else:
        text = json.dumps(_relative(value, plan_dir), sort_keys=True, ensure_ascii=False, default=str)
        yield name, _short(text)


def _relative(value: Any, plan_dir: str) -> Any:
    """The value with every text that is a path in the plan's folder made relative to it."""
    if isinstance(value, str):
        if value == plan_dir:
            return _PLAN_DIR
        return _PLAN_DIR + value.removeprefix(plan_dir) if value.startswith(plan_dir + "/") else value
    if isinstance(value, dict):
        return {key: _relative(item, plan_dir) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_relative(item, plan_dir) for item in value]
    return value


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:32]}... {text_hash(text)}"
