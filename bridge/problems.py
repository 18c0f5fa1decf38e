"""What is wrong with a plan: one `Problem` per fault, all of them in one `PlanError`, and the nearest word for a typo.

`document`, `fields` and `checks` make `Finding`s (a path into the plan and a sentence); `reader` knows their lines.
"""

import difflib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from steps import Frozen

Path = tuple[str | int, ...]
"""Way from the top of a plan file to a value: `("steps", 2, "download", "url")`."""

Severity = Literal["error", "warning"]

ALIASES = {
    "id": ("key", "step_id", "identifier"),
    "name": ("title", "display_name"),
    "type": ("kind", "uses", "step_type", "action"),
    "command": ("cmd", "run", "exec", "program", "executable", "entry", "shell"),
    "args": ("arguments", "argv", "arg"),
    "depends_on": ("needs", "depends", "dependencies", "after", "requires", "dependson", "upstream"),
    "when": ("if", "condition", "only_if", "conditions"),
    "timeout_seconds": ("timeout", "timeout_s", "timeout_sec", "time_limit", "deadline"),
    "allow_failure": ("continue_on_error", "ignore_errors", "ignore_failure", "allow_fail", "soft_fail"),
    "env": ("environment", "envs", "env_vars", "variables"),
    "working_dir": ("cwd", "workdir", "working_directory", "work_dir", "directory", "chdir"),
    "resources": ("resource", "requests", "limits"),
    "image": ("container", "docker_image", "container_image", "tag", "tags"),
    "retry": ("retries", "retry_policy", "retry_strategy", "retrys"),
    "matrix": ("foreach", "for_each", "with_items", "strategy", "loop"),
    "max_parallel": ("parallel", "concurrency", "max_concurrency", "parallelism", "max_workers"),
    "locks": ("lock", "mutex", "semaphore"),
    "secrets": ("secret", "secret_env"),
    "outputs": ("output", "results", "produces"),
    "cache": ("caching", "memoize", "memo"),
    "params": ("parameters", "inputs", "vars", "arguments", "with"),
    "steps": ("tasks", "jobs", "stages", "nodes"),
    "defaults": ("default",),
    "log_dir": ("logs", "log_directory", "logs_dir"),
    "on_failure": ("on_error", "fail_fast"),
    "cpus": ("cpu", "num_cpus", "cores"),
    "gpus": ("gpu", "num_gpus"),
    "memory": ("mem", "ram"),
    "max_attempts": ("attempts", "count", "max", "limit", "max_retries", "times"),
    "backoff_s": ("backoff", "delay", "interval", "wait"),
    "max_backoff_s": ("max_backoff", "max_delay", "max_interval"),
    "choices": ("enum", "options", "allowed"),
    "description": ("desc", "help", "doc"),
    "sha256": ("checksum", "sha", "hash", "sha256sum", "digest"),
    "output": ("dest", "destination", "path", "file", "target_path", "out"),
    "url": ("uri", "source", "src", "link", "href"),
    "model_id": ("model", "repo_id", "repo"),
    "dataset_id": ("dataset", "repo_id", "repo"),
    "launcher_path": ("launcher",),
    "context": ("build_context",),
    "dockerfile": ("file", "docker_file"),
    "build_args": ("args", "buildargs"),
    "status": ("state", "outcome", "result"),
    "exit_code": ("exit", "exitcode", "code", "returncode"),
    "step": ("id", "step_id", "name"),
    "all": ("and", "all_of"),
    "any": ("or", "any_of"),
    "failure": ("failed", "fail", "error"),
    "success": ("succeeded", "ok", "succeed"),
    "integer": ("int",),
    "number": ("float", "double"),
    "string": ("str", "text"),
    "boolean": ("bool",),
    "list": ("array",),
    "object": ("dict", "map", "mapping"),
}
"""Our word -> what people write for it."""


@dataclass(frozen=True)
class Finding:
    """A fault at a path of the plan; it becomes a `Problem` once the file and the line are known."""

    path: Path
    message: str
    hint: str = ""
    severity: Severity = "error"
    at_key: bool = False
    """True when the key itself is wrong, not its value."""


class Problem(Frozen):
    """One fault of a plan, with its place."""

    severity: Severity = "error"
    file: str = ""
    """The plan file; empty for a plan that was built in Python or for a value from the command line."""
    line: int | None = None
    """From 1."""
    column: int | None = None
    """From 1."""
    path: str = ""
    """Place in the plan, like `steps[2].download.url`."""
    message: str
    hint: str = ""

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part not in ("", None))
        text = f"{place}: {self.severity}: {self.message}" if place else f"{self.severity}: {self.message}"
        return f"{text}\n  hint: {self.hint}" if self.hint else text


class PlanError(ValueError):
    """The plan is not valid. Its one argument is the sequence of all `Problem`s found. Never worth trying again."""

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Every problem, in the order of the file."""
        return tuple(self.args[0])

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


def path_text(path: Path) -> str:
    """`("steps", 2, "url")` as `steps[2].url`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was most likely meant, or None."""
    names = list(known)
    plain = _plain(word)
    for name in names:
        if _plain(name) == plain:
            return name
    for name in names:
        if plain in {_plain(alias) for alias in ALIASES.get(name, ())}:
            return name
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return close[0] if close else None


def nearest_hint(word: str, known: Collection[str], noun: str = "known names") -> str:
    """A hint that names the nearest word, or else the known ones."""
    found = nearest(word, known)
    if found is not None:
        return f"did you mean `{found}`?"
    named = sorted(word for word in known if word)
    return f"{noun}: {listed(named)}" if named else ""


def listed(words: Sequence[str], limit: int = 12) -> str:
    """Words in backticks, the rest counted."""
    shown = ", ".join(f"`{word}`" for word in words[:limit])
    return f"{shown} and {len(words) - limit} more" if len(words) > limit else shown


def brief(value: object, limit: int = 60) -> str:
    """A value in backticks, cut to a length that fits a line."""
    text = (
        {True: "true", False: "false", None: "null"}[value]
        if value is None or value is True or value is False
        else str(value)
    )
    return f"`{text[:limit]}...`" if len(text) > limit else f"`{text}`"


def describe(value: Any) -> str:
    """A value for an error message: itself, or what kind of container it is."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return brief(value)


def _plain(word: str) -> str:
    return word.lower().replace("_", "").replace("-", "").replace(" ", "")
