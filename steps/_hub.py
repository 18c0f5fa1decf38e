"""Fetching from a Hugging Face hub, for the two `hf_download_*` types: environment, progress, and how it ended."""

import contextlib
import json
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steps import Context, Outputs, StepError, StepFailed

_CLIENT = Path(__file__).with_name("_hub_client.py")
_LOOK_S = 0.5


def fetch(
    context: Context,
    *,
    repo_type: str,
    repo_id: str,
    revision: str,
    cache_dir: str,
    token_secret: str,
    allow_patterns: Sequence[str],
    ignore_patterns: Sequence[str],
    config: str = "",
    split: str = "",
) -> Outputs:
    """Fetch a repository, or with `config` or `split` a prepared dataset, into the hub's own cache.

    Returns `path` and `revision` (the commit), for a prepared dataset also `rows`. Raises `StepError` for what does
    not exist or is not allowed, `StepFailed` when the hub or the disk fails.
    """
    result, progress = (context.attempt_dir / f"hub-{name}.json" for name in ("result", "progress"))
    for file in (result, progress):
        file.unlink(missing_ok=True)
    request = {
        "repo_type": repo_type,
        "repo_id": repo_id,
        "revision": revision or None,
        "allow_patterns": list(allow_patterns) or None,
        "ignore_patterns": list(ignore_patterns) or None,
        "config": config or None,
        "split": split or None,
        "progress": str(progress),
        "result": str(result),
    }
    env = _environment(context, cache_dir, token_secret)
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(progress, context, ended), daemon=True)
    watcher.start()
    try:
        # -P: a file of the plan's folder must not stand in for a package.
        argv = [sys.executable, "-P", str(_CLIENT)]
        exit_code = context.run_process(argv, env=env, stdin=json.dumps(request).encode())
    finally:
        ended.set()
        watcher.join(2)
    if not result.exists():
        raise StepFailed(f"the hub client ended with exit code {exit_code} and without a result", exit_code)
    outcome: dict[str, Any] = json.loads(result.read_text())
    if "error" in outcome:
        raise (StepError if outcome["final"] else StepFailed)(outcome["error"])
    return outcome


def _environment(context: Context, cache_dir: str, token_secret: str) -> Mapping[str, str]:
    env = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONUNBUFFERED": "1"}
    if token_secret:
        if token_secret not in context.secrets:
            raise StepError(
                f"secret `{token_secret}` of `token_secret` is not declared\n\n"
                f"hint: add `secrets: [{token_secret}]` to the step"
            )
        env["HF_TOKEN"] = context.secrets[token_secret]
    if cache_dir:
        home = context.plan_dir / cache_dir
        # The login of the node stays where it was.
        default_home = Path(context.env.get("HOME", "/")) / ".cache" / "huggingface"
        login = Path(context.env.get("HF_HOME") or default_home) / "token"
        env |= {
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_DATASETS_CACHE": str(home / "datasets"),
            "HF_TOKEN_PATH": context.env.get("HF_TOKEN_PATH") or str(login),
        }
    return env


def _watch(progress: Path, context: Context, ended: threading.Event) -> None:
    last = False
    while not last:
        last = ended.wait(_LOOK_S)
        with contextlib.suppress(FileNotFoundError):
            context.heartbeat(json.loads(progress.read_text()))
