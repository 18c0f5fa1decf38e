"""Secrets by name, resolved where the step runs; their values never leave that process."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from steps._contract import StepError

SECRETS_DIR_VARIABLE = "ORCHESTRATE_SECRETS_DIR"
_CONTAINER_SECRETS = Path("/run/secrets")


def resolve_secrets(names: Iterable[str], workflow_id: str) -> dict[str, str]:
    """Values by name: from the run's own folder, the secrets folder, the environment, then `/run/secrets`.

    In its own folder are the values that whoever started the run handed over; the secrets folder is
    `$ORCHESTRATE_SECRETS_DIR`. Raises `StepError` naming the secret that is nowhere; a value is never part of an error.
    """
    folder = os.environ.get(SECRETS_DIR_VARIABLE)
    folders = [run_secrets_dir(Path(folder), workflow_id), Path(folder)] if folder else []
    return {name: _resolve(name, folders) for name in names}


def run_secrets_dir(secrets_dir: Path, workflow_id: str) -> Path:
    """The folder of the secrets that were handed over with a run, inside `secrets_dir` whatever its id is.

    Named by a hash: an id may be a path (`..`, `/data`) or the parent of another's (`team`, `team/a`).
    """
    return secrets_dir / "runs" / hashlib.sha256(workflow_id.encode(errors="surrogatepass")).hexdigest()


def is_known(name: str, folder: Path) -> bool:
    """True when a step that runs beside this process would find the secret, `folder` being its secrets folder."""
    return (folder / name).is_file() or name in os.environ or (_CONTAINER_SECRETS / name).is_file()


def _resolve(name: str, folders: list[Path]) -> str:
    if "/" in name or name.startswith("."):
        raise StepError(f"secret name `{name}` is not a plain name")
    for path in (folder / name for folder in folders):
        if path.is_file():
            return path.read_text().removesuffix("\n")
    if name in os.environ:
        return os.environ[name]
    if (_CONTAINER_SECRETS / name).is_file():
        return (_CONTAINER_SECRETS / name).read_text().removesuffix("\n")
    raise StepError(
        f"secret `{name}` is not known where the step runs\n\n"
        f"hint: `orchestrate secret set {name}`, or set `{name}` in the environment of the worker"
    )
