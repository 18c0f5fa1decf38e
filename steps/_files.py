"""The files of one attempt, and how they are written: whole, or not at all."""

import json
import os
from pathlib import Path
from typing import Any

from steps._request import StepRequest, StepResult

REQUEST, HOST, RESULT, PROGRESS, OUTPUTS = (
    "request.json",
    "host.json",
    "result.json",
    "progress.json",
    "outputs.jsonl",
)


def attempt_dir(request: StepRequest) -> Path:
    """`<log_dir>/<workflow_id>/<run_id>/<step_id>/attempt-<n>`, the step id made safe as a file name."""
    run_dir = Path(request.log_dir) / file_name(request.workflow_id) / request.run_id
    return run_dir / file_name(request.step_id) / f"attempt-{request.attempt}"


def file_name(identifier: str) -> str:
    """An id as a file name: `/`, `\\` and spaces become `_`, as in the original's logs."""
    safe = identifier.strip().replace("/", "_").replace("\\", "_").replace(" ", "_")
    return "_" + safe if safe in ("", ".", "..") else safe


def write_whole(path: Path, text: str, mode: int = 0o666) -> None:
    """Write by a temporary file and rename; a reader sees the old text or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    temporary.replace(path)


def write_once(path: Path, text: str) -> bool:
    """Write a file that must not exist yet; False when somebody else was first."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    temporary.write_text(text)
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None when there is no such file."""
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return value


def read_result(folder: Path) -> StepResult | None:
    """The result of the attempt in `folder`, None while it has none."""
    try:
        return StepResult.model_validate_json((folder / RESULT).read_bytes())
    except FileNotFoundError:
        return None
