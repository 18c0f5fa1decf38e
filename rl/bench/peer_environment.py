"""An environment of its own for a library that is compared with: made once by uv, pinned, kept in a cache folder.

TRL -> peer_python -> <cache>/orchestrate-bench/trl-<digest>/bin/python
"""

import hashlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

_INSTALL_TIMEOUT_S = 900
_PINNED = ("trl==1.16.0", "accelerate==1.15.0", "datasets==5.2.0")
_SAME = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "psutil")
"""Packages that are to be the same as here, so that the libraries are compared and not what they stand on."""


class NoEnvironment(Exception):
    """The environment cannot be made. The argument says why."""


def peer_python() -> str:
    """The interpreter of TRL's environment, which is made if it is not there. Raises `NoEnvironment`."""
    requirements = [*_PINNED, *(f"{name}=={version(name)}" for name in _SAME)]
    python_version = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256("\n".join([python_version, *requirements]).encode()).hexdigest()[:10]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "orchestrate-bench" / f"trl-{digest}"
    python, stamp = folder / "bin" / "python", folder / ".complete"
    if stamp.exists():
        return str(python)
    shutil.rmtree(folder, ignore_errors=True)
    uv = _uv()
    for command in (
        [uv, "venv", "--quiet", "--python", sys.executable, str(folder)],
        [uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", str(python), *requirements],
    ):
        _run(command)
    stamp.touch()
    return str(python)


def _uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        raise NoEnvironment("there is no `uv`, which makes TRL's environment\n\nhint: `pip install uv`")
    return found


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **_wheels()},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_INSTALL_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise NoEnvironment(f"`{' '.join(command[:3])}` is not done after {_INSTALL_TIMEOUT_S} s") from None
    if done.returncode:
        raise NoEnvironment(f"`{' '.join(command[:3])}` ended with code {done.returncode}: {done.stderr.strip()}")


def _wheels() -> dict[str, str]:
    """Where uv finds the build of torch that is installed here: pip's wheel folders, or PyTorch's own index."""
    folders = ",".join(os.environ.get("PIP_FIND_LINKS", "").split())
    found = {"UV_FIND_LINKS": folders} if folders and "UV_FIND_LINKS" not in os.environ else {}
    build = version("torch").partition("+")[2]
    if build and not folders and "UV_FIND_LINKS" not in os.environ:
        found["UV_TORCH_BACKEND"] = os.environ.get("UV_TORCH_BACKEND", build)
    return found
