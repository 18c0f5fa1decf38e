"""Program that fetches one repository of a Hugging Face hub; runs in a process of its own, so that it can be killed.

    request (JSON on stdin) -> hub client -> progress file, by rename -> result file, by rename

The environment says where the hub and its cache are and holds the token. It imports nothing of this project: it is
started by path, with the step's environment.
"""

import errno
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]
from tqdm import tqdm

_TRANSIENT_STATUS = (408, 425, 429)
_TIMEOUT_S = 30.0


class _Final(Exception):
    """What was asked for does not exist; asking again cannot help."""


def _write(path: str, value: dict[str, Any]) -> None:
    temporary = f"{path}.{os.getpid()}.{threading.get_ident()}"
    Path(temporary).write_text(json.dumps(value))
    Path(temporary).replace(path)


def _progress_bar(path: str) -> type[Any]:
    """A progress bar class that shows nothing and keeps the bytes in a file."""

    class FileProgress(tqdm):  # type: ignore[type-arg]
        written_at = 0.0

        def display(self, *args: Any, **kwargs: Any) -> None:
            """Nothing on the terminal."""

        def update(self, n: float | None = 1) -> bool | None:
            """Count, and tell twice a second and when all bytes known so far are there."""
            shown = super().update(n)
            now = time.monotonic()
            due = now - FileProgress.written_at > 0.5 or self.n >= (self.total or 0)
            if self.unit == "B" and self.total and self.n and due:
                FileProgress.written_at = now
                text = f"{self.n / 1e6:.1f} of {self.total / 1e6:.1f} MB"
                _write(path, {"text": text, "fraction": min(1.0, self.n / self.total)})
            return shown

    return FileProgress


def _fetch_files(request: dict[str, Any]) -> dict[str, Any]:
    selection = {"allow_patterns": request["allow_patterns"], "ignore_patterns": request["ignore_patterns"]}
    expected: list[str] = []
    if not constants.HF_HUB_OFFLINE:
        # Asked first: the snapshot call falls back to what is in the cache when the hub does not answer.
        info = HfApi().repo_info(
            request["repo_id"], repo_type=request["repo_type"], revision=request["revision"], timeout=_TIMEOUT_S
        )
        expected = list(
            filter_repo_objects([file.rfilename for file in getattr(info, "siblings", None) or []], **selection)
        )
        if not expected:
            raise _Final(f"no file of `{request['repo_id']}` matches the patterns")
    path = snapshot_download(
        request["repo_id"],
        repo_type=request["repo_type"],
        revision=request["revision"],
        tqdm_class=_progress_bar(request["progress"]),
        **selection,
    )
    missing = [name for name in expected if not (Path(path) / name).exists()]
    if missing:
        raise ConnectionError(f"the hub stopped answering; `{missing[0]}` is not in `{path}`")
    return {"path": path, "revision": Path(path).name}


def _load_dataset(request: dict[str, Any]) -> dict[str, Any]:
    try:
        from datasets import DatasetDict, load_dataset
    except ImportError as error:
        raise _Final(
            f"`config` and `split` need the package `datasets`: {error}\n\n"
            "hint: install `sygaldry-ray[datasets]` where the step runs, or leave both away to get the files"
        ) from error
    revision = request["revision"]
    if not constants.HF_HUB_OFFLINE:
        revision = HfApi().dataset_info(request["repo_id"], revision=revision, timeout=_TIMEOUT_S).sha
    loaded = load_dataset(request["repo_id"], request["config"], split=request["split"], revision=revision)
    parts = list(loaded.values()) if isinstance(loaded, DatasetDict) else [loaded]
    files = [file["filename"] for part in parts for file in part.cache_files]
    folder = Path(files[0]).parent if files else Path(constants.HF_HOME) / "datasets"
    return {"path": str(folder), "revision": revision or "", "rows": sum(part.num_rows for part in parts)}


def _explained(error: Exception, request: dict[str, Any]) -> dict[str, Any]:
    """The error for people, and whether trying again is useless."""
    name = f"{request['repo_type']} `{request['repo_id']}`"
    said = str(error).strip() or type(error).__name__
    if isinstance(error, _Final):
        return {"final": True, "error": said}
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "make room, or choose another disk by `cache_dir`"
        return {"final": False, "error": f"the disk of `{constants.HF_HOME}` is full\n\nhint: {hint}"}
    if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return {"final": True, "error": f"{name} is not in the cache, and `HF_HUB_OFFLINE` forbids to ask the hub"}
    hints = {
        GatedRepoError: f"accept its terms at {constants.ENDPOINT} and give a token by `token_secret`",
        RepositoryNotFoundError: "look at the id; a private repository looks like this without `token_secret`",
        RevisionNotFoundError: f"`{request['revision']}` is no branch, tag or commit of it",
    }
    for kind, hint in hints.items():
        if isinstance(error, kind):
            return {"final": True, "error": f"{name} cannot be had: {_first_lines(said)}\n\nhint: {hint}"}
    final = isinstance(error, HFValidationError | ValueError)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        final = 400 <= status < 500 and status not in _TRANSIENT_STATUS
    if type(error).__name__ in ("DatasetNotFoundError", "DataFilesNotFoundError"):
        final = True
    return {"final": final, "error": f"{name}: {type(error).__name__}: {_first_lines(said)}"}


def _first_lines(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines()[:6] if line.strip())


def main() -> None:
    """Do what the request says; every end but a kill leaves a result file."""
    request = json.load(sys.stdin)
    try:
        result = (_load_dataset if request["config"] or request["split"] else _fetch_files)(request)
    except Exception as error:
        result = _explained(error, request)
    _write(request["result"], result)


if __name__ == "__main__":
    main()
