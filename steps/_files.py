"""The files of one attempt, and how they are written: whole, or not at all."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from steps._request import StepRequest, StepResult

REQUEST, HOST, CANCEL, RESULT, PROGRESS, OUTPUTS = (
    "request.json",
    "host.json",
    "cancel",
    "result.json",
    "progress.json",
    "outputs.jsonl",
)
_LONGEST_NAME = 200
"""Bytes of one file name; file systems allow 255, and temporary names are longer."""


def attempt_dir(request: StepRequest) -> Path:
    """`<log_dir>/<workflow_id>/<run_id>/<step_id>/attempt-<n>`, the step id made safe as a file name."""
    workflow, step = file_name(request.workflow_id), file_name(request.step_id)
    return Path(request.log_dir, workflow, request.run_id, step, f"attempt-{request.attempt}")


def file_name(identifier: str) -> str:
    """An id as a file name: `/`, `\\` and spaces become `_`, as in the original's logs; a long one ends in a hash."""
    safe = identifier.strip().replace("/", "_").replace("\\", "_").replace(" ", "_")
    encoded = safe.encode(errors="replace")
    if len(encoded) > _LONGEST_NAME:
        safe = f"{encoded[:180].decode(errors='ignore')}-{hashlib.sha256(encoded).hexdigest()[:16]}"
    return "_" + safe if safe in ("", ".", "..") else safe


def write_whole(path: Path, text: str, mode: int = 0o666) -> None:
    """Write by a temporary file and rename; a reader sees the old text or the whole new one."""
    temporary = _write_beside(path, text, mode)
    os.replace(temporary, path)  # noqa: PTH105 - on the path of every step


def write_once(path: Path, text: str, mode: int = 0o666) -> bool:
    """Write a file that must not exist yet; False when somebody else was first."""
    temporary = _write_beside(path, text, mode)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)  # noqa: PTH108 - on the path of every step
    return True


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None when there is no such file."""
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    return value


def read_result(folder: Path) -> StepResult | None:
    """The result of the attempt in `folder`, None while it has none."""
    try:
        return StepResult.model_validate_json((folder / RESULT).read_bytes())
    except FileNotFoundError:
        return None


def _write_beside(path: Path, text: str, mode: int) -> str:
    """A new file beside `path` with the whole text."""
    folder, name = os.path.split(path)
    temporary = f"{folder}/.{name}.{os.getpid()}.{os.urandom(4).hex()}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        rest = text.encode()
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except BaseException:
        os.unlink(temporary)  # noqa: PTH108 - on the path of every step
        raise
    finally:
        os.close(descriptor)
    return temporary
