"""A Python environment laid over the Spack view of the container it is in: it sees the view's packages behind its own.

    _project.py (sync, run), _uv_install.py -> Overlay.make -> uv -> names_in, packages -> Withheld.has: refused or kept

A wheel of torch or CUDA in it would hide the view's build, so what the view has is withheld from it.
Needs the standard library alone.
"""

import contextlib
import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

UV_SETTINGS = {"UV_CACHE_DIR": "/opt/bazel_cache/uv_cache", "UV_PYTHON_DOWNLOADS": "never"}
"""Unless the container has others."""
INSTALL_TIMEOUT_S = 3600
QUESTION_TIMEOUT_S = 120

_STACK = re.compile(r"torch|torchvision|torchaudio|(pytorch-)?triton|jax|jaxlib|cupy(-cuda\d+x?)?")
"""Builds that must fit the GPUs and each other; those that the view has are not installed over it."""
_CUDA = re.compile(r"nvidia-(?!ml-py$).+|cuda-toolkit|jax-cuda\d+-(plugin|pjrt)")
"""Wheels with parts of CUDA; none is installed where the view has torch or JAX with a CUDA of their own."""


class Refused(Exception):
    """The environment is not, or would not be, what it should be."""


def active_view() -> tuple[str, str]:
    """Name and interpreter of the Spack view that is active; of the image, when there is none or it has no Python."""
    view = Path(os.environ.get("SPACK_ENV_VIEW") or "/nonexistent")
    python = view / "bin" / "python3"
    return (view.name, str(python)) if python.exists() else ("image", "python3")


class Overlay:
    """One environment over the active view."""

    def __init__(self, venv: Path) -> None:
        self.python = active_view()[1]
        self.venv = venv
        self.venv_python = venv / "bin" / "python"

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """One change at a time; another waits for its end."""
        self.venv.parent.mkdir(parents=True, exist_ok=True)
        with (self.venv.parent / f".{self.venv.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def make(self, view: dict[str, Any]) -> None:
        """An empty environment over the view, unless there is one that fits."""
        made_for = self.venv / "sygaldry-view.json"
        identity = json.dumps([view["python"], view["base"], view["folders"]])
        if self.venv_python.exists() and made_for.exists() and made_for.read_text() == identity:
            return
        uv("venv", "--quiet", "--clear", "--system-site-packages", "--python", self.python, str(self.venv))
        # A view that is itself an environment keeps its packages from what stands on the interpreter below it.
        own = next(self.venv.glob("lib/python3.*/site-packages"))
        (own / "_sygaldry_view.pth").write_text("".join(f"{folder}\n" for folder in view["folders"]))
        write_whole(made_for, identity)

    def refuse_hidden(self, withheld: "Withheld") -> None:
        """Raise `Refused` when something installed here hides what the view has."""
        hiding = [name for name in names_in(self.venv) if withheld.has(name)]
        if hiding:
            raise Refused(
                f"{', '.join(f'`{name}`' for name in hiding)} in `{self.venv}` would hide the view's own build\n\n"
                "hint: orchestrate container sync"
            )


class Withheld:
    """What is not installed, because the view has it."""

    def __init__(self, view: dict[str, Any]) -> None:
        known = view["distributions"]
        self.names = sorted(name for name in known if _STACK.fullmatch(name) or _CUDA.fullmatch(name))
        self._has_stack = bool({"torch", "jaxlib"} & known.keys())

    def has(self, name: str) -> bool:
        """Whether a distribution is not to be installed."""
        return name in self.names or (self._has_stack and _CUDA.fullmatch(name) is not None)

    def leave_out(self, locked: str) -> tuple[str, list[str]]:
        """Locked requirements without those, and the names of those."""
        kept, left_out, keeping = [], [], True
        for line in locked.splitlines(keepends=True):
            # Hashes and comments of a requirement are indented.
            if line[0].isalnum():
                name = plain(re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0])
                keeping = not self.has(name)
                left_out += [] if keeping else [name]
            if keeping:
                kept.append(line)
        return "".join(kept), left_out


def names_in(venv: Path) -> list[str]:
    """Distributions installed in the environment itself."""
    found = venv.glob("lib*/python3.*/site-packages/*.dist-info")
    return sorted({plain(path.name.removesuffix(".dist-info").rpartition("-")[0]) for path in found})


def packages(python: str, *requirements: str) -> dict[str, Any]:
    """What another interpreter has, see `_packages.py`."""
    argv = [python, str(Path(__file__).with_name("_packages.py")), *requirements]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=QUESTION_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Refused(f"`{python}` cannot be asked what it has: {error}") from error
    if done.returncode:
        raise Refused(f"`{python}` cannot be asked what it has: {done.stderr.strip()}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def uv(*arguments: str, text: str = "") -> str:
    """Run uv with `text` as its stdin; what it printed."""
    environment = {**UV_SETTINGS, **os.environ, "UV_NO_PROGRESS": "1"}
    for name in ("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT"):
        environment.pop(name, None)
    try:
        done = subprocess.run(
            ["uv", *arguments],
            env=environment,
            input=text,
            stdout=subprocess.PIPE,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
        )
    except FileNotFoundError:
        raise Refused("there is no `uv` in this image\n\nhint: orchestrate container build") from None
    except subprocess.TimeoutExpired:
        raise Refused(f"`uv {arguments[0]}` did not end within {INSTALL_TIMEOUT_S} s") from None
    if done.returncode:
        raise Refused(f"`uv {' '.join(arguments[:2])}` ended with exit code {done.returncode}; above is what it said")
    return done.stdout


def write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.replace(path)


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def say(text: str) -> None:
    print(text, file=sys.stderr)
