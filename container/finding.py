"""What a diagnosis found: one line each, with what to do about it. Knows nothing of GPUs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Level = Literal["PASS", "INFO", "WARN", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    check: str
    """What was looked at: `hardware`, `driver`, `modules`, `nouveau`, `devices`, `gpu`, `docker`, `toolkit`, `test`."""
    message: str
    hint: str = ""
    fix: tuple[str, ...] = ()
    """Commands that would help; they are shown, never run."""


def has_problems(findings: Sequence[Finding]) -> bool:
    """Whether something is wrong; warnings alone are not."""
    return any(finding.level == "FAIL" for finding in findings)


def document(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings as JSON data."""
    return {
        "ok": not has_problems(findings),
        "counts": {level: sum(finding.level == level for finding in findings) for level in get_args(Level)},
        "findings": [{**asdict(finding), "fix": list(finding.fix)} for finding in findings],
        "fix": fixes(findings),
    }


def fixes(findings: Sequence[Finding]) -> list[str]:
    """Commands that would help against the problems and warnings, each once, in order."""
    return list(dict.fromkeys(line for finding in findings for line in finding.fix))
