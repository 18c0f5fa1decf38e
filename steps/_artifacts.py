"""Files a step has promised: found by path, folder or glob in the plan's folder, with their hashes."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from steps._contract import StepFailed
from steps._file_patterns import matching


def file_hash(path: Path) -> str:
    """`sha256:` and 64 hex digits. Raises `OSError` when the file cannot be read."""
    with path.open("rb", buffering=0) as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def artifact_hashes(
    plan_dir: Path, promised: Iterable[str], optional: Iterable[str], between: Callable[[], None]
) -> dict[str, str]:
    """Path relative to `plan_dir` (absolute outside it) -> hash. Raises `StepFailed` when a promised one is not there.

    `between` is called before each file.
    """
    wanted = [(pattern, True) for pattern in promised] + [(pattern, False) for pattern in optional]
    found: dict[str, str] = {}
    for pattern, must_exist in wanted:
        files = matching(plan_dir, pattern)
        if not files and must_exist:
            raise StepFailed(f"the step did not make its declared artifact `{pattern}`")
        for name, path in files:
            between()
            try:
                found[name] = file_hash(path)
            except OSError as error:
                raise StepFailed(f"the artifact `{name}` cannot be read: {error.strerror}") from error
    return found
