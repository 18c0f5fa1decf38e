"""The Python environment of a repository, laid over the Spack view of the container it is used in.

    orchestrate container sync -> _project.py sync      uv resolves and installs, then the result is checked
    orchestrate container run  -> _project.py run -- C  becomes C in that environment, which is made when there is none

The environment sees the view's packages behind its own. A wheel of torch or CUDA in it would hide the view's build:
such requirements are left out, and an environment that has one, or needs another version, is refused.

Runs inside the container, with the standard library alone.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

VENVS = Path("/opt/bazel_cache/uv_venvs")
_UV = {"UV_CACHE_DIR": "/opt/bazel_cache/uv_cache", "UV_PYTHON_DOWNLOADS": "never"}
"""Settings of uv, unless the container has others."""
INSTALL_TIMEOUT_S = 3600
QUESTION_TIMEOUT_S = 120
REFUSED = 1
_PROJECT = Path("pyproject.toml")

_STACK = re.compile(r"torch|torchvision|torchaudio|(pytorch-)?triton|jax|jaxlib|cupy(-cuda\d+x?)?")
"""Builds that must fit the GPUs and each other; those that the view has are not installed over it."""
_CUDA = re.compile(r"nvidia-(?!ml-py$).+|cuda-toolkit|jax-cuda\d+-(plugin|pjrt)")
"""Wheels with parts of CUDA; none is installed where the view has torch or JAX with a CUDA of their own."""


class Refused(Exception):
    """The environment is not, or would not be, what it should be."""


def main() -> int:
    """Run one of the verbs; its exit code."""
    parser = argparse.ArgumentParser(prog="orchestrate container")
    verbs = parser.add_subparsers(dest="verb", required=True)
    sync = verbs.add_parser("sync")
    sync.add_argument("--requirements", type=Path)
    sync.add_argument("--extra", action="append", default=[])
    sync.add_argument("--group", action="append", default=[])
    verbs.add_parser("run").add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    project = Project()
    try:
        if given.verb == "run":
            project.run(given.command[1:] if given.command[:1] == ["--"] else given.command)
        project.sync(given.requirements, given.extra, given.group)
    except Refused as refused:
        _say(f"error: {refused}")
        return REFUSED
    return 0


class Project:
    """The repository in the current folder and the environment that belongs to it in this container."""

    def __init__(self) -> None:
        view = Path(os.environ.get("SPACK_ENV_VIEW") or "/nonexistent")
        self.python = str(view / "bin" / "python3") if (view / "bin" / "python3").exists() else "python3"
        self.venv = VENVS / f"project-{view.name if self.python != 'python3' else 'image'}"
        self.venv_python = self.venv / "bin" / "python"
        self._passed = self.venv / "sygaldry-passed.json"
        """What the last sync saw; only there when the check has passed."""

    def sync(self, requirements: Path | None, extras: Sequence[str], groups: Sequence[str]) -> None:
        """Make the environment what the repository asks for. Raises `Refused`."""
        with self._alone():
            inputs = [requirements] if requirements else _inputs()
            view = _packages(self.python)
            self._make(view)
            self._passed.unlink(missing_ok=True)
            withheld = Withheld(view)
            if inputs:
                self._install(inputs[0], withheld, extras, groups)
            self._check(withheld, inputs)
            known = {"view": view, "inputs": {str(path): _digest(path) for path in inputs}}
            _write_whole(self._passed, json.dumps(known))
        names = " and ".join(map(str, inputs)) or "nothing, there is no pyproject.toml or requirements.txt"
        _say(f"synced `{self.venv}` from {names}")

    def run(self, command: Sequence[str]) -> NoReturn:
        """Become `command` in the environment. Raises `Refused`."""
        if not command:
            raise Refused("got no command\n\nhint: orchestrate container run -- COMMAND [ARGUMENT...]")
        # A link to an interpreter of another image leads nowhere.
        if not self.venv_python.exists():
            self.sync(None, (), ())
        try:
            known = json.loads(self._passed.read_text())
        except (OSError, ValueError):
            raise Refused(f"`{self.venv}` did not pass its last check\n\nhint: orchestrate container sync") from None
        self._refuse_hidden(Withheld(known["view"]), _names_in(self.venv))
        if any(_digest(Path(path)) != digest for path, digest in known["inputs"].items()):
            _say("what the repository asks for has changed since; `orchestrate container sync` installs it")
        environment = {**_UV, **os.environ, "VIRTUAL_ENV": str(self.venv), "UV_PROJECT_ENVIRONMENT": str(self.venv)}
        environment["PATH"] = f"{self.venv}/bin:{os.environ.get('PATH', os.defpath)}"
        try:
            os.execvpe(command[0], list(command), environment)
        except OSError as error:
            _say(f"error: `{command[0]}` cannot be run: {error.strerror}")
            sys.exit(127 if isinstance(error, FileNotFoundError) else 126)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One sync at a time; another waits for its end."""
        self.venv.parent.mkdir(parents=True, exist_ok=True)
        with (self.venv.parent / f".{self.venv.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make(self, view: dict[str, Any]) -> None:
        """An empty environment over the view, unless there is one that fits."""
        made_for = self.venv / "sygaldry-view.json"
        identity = json.dumps([view["python"], view["base"], view["folders"]])
        if self.venv_python.exists() and made_for.exists() and made_for.read_text() == identity:
            return
        _uv("venv", "--quiet", "--clear", "--system-site-packages", "--python", self.python, str(self.venv))
        # A view that is itself an environment keeps its packages from what stands on the interpreter below it.
        own = next(self.venv.glob("lib/python3.*/site-packages"))
        (own / "_sygaldry_view.pth").write_text("".join(f"{folder}\n" for folder in view["folders"]))
        _write_whole(made_for, identity)

    def _install(self, source: Path, withheld: "Withheld", extras: Sequence[str], groups: Sequence[str]) -> None:
        options = ["--quiet", *(f"--extra={name}" for name in extras), *(f"--group={name}" for name in groups)]
        target = ("--quiet", "--python", str(self.venv_python))
        if source.name == "uv.lock":
            locked = _uv("export", "--frozen", "--no-dev", "--no-emit-project", *options)
        else:
            overrides = self.venv / "sygaldry-overrides.txt"
            # Without them uv would look for a torch that suits all the rest.
            overrides.write_text("".join(f'{name} ; sys_platform == "never"\n' for name in withheld.names))
            options += ["--override", str(overrides), "--emit-index-url", "--emit-find-links"]
            locked = _uv("pip", "compile", str(source), *target, *options)
        kept, left_out = withheld.leave_out(locked)
        (self.venv / "sygaldry-locked.txt").write_text(kept)
        for name in left_out:
            _say(f"left out `{name}`: the view has its own")
        # From stdin, because relative paths in it mean the repository.
        _uv("pip", "sync", "--allow-empty-requirements", *target, "-", text=kept)
        if _is_package():
            _uv("pip", "install", "--no-deps", *target, "--editable", ".")

    def _check(self, withheld: "Withheld", inputs: Sequence[Path]) -> None:
        seen = _packages(str(self.venv_python), *_asked_for(inputs))
        self._refuse_hidden(withheld, _names_in(self.venv))
        for module, origin in seen["modules"].items():
            if module in withheld.names and origin.startswith(f"{self.venv}/"):
                raise Refused(f"module `{module}` would come from `{origin}`, and the view has its own")
        if not seen["compared"]:
            _say("versions are not compared with the view's: no Python here has `packaging`")
        unmet = [each for each in seen["unmet"] if each["name"] in withheld.names]
        if unmet:
            lines = [f"{each['by']} wants {each['name']}{each['wanted']}, the view has {each['got']}" for each in unmet]
            raise Refused(
                "the repository does not fit the view: " + "; ".join(lines) + "\n\n"
                "hint: ask for the view's version, or build a Spack environment that has the other one"
            )

    def _refuse_hidden(self, withheld: "Withheld", names: Sequence[str]) -> None:
        hiding = [name for name in names if withheld.has(name)]
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
                name = _plain(re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0])
                keeping = not self.has(name)
                left_out += [] if keeping else [name]
            if keeping:
                kept.append(line)
        return "".join(kept), left_out


def _inputs() -> list[Path]:
    """What says which packages a repository needs; the first decides."""
    # A project file may hold nothing but settings of tools.
    if _has_table("project"):
        return [*([Path("uv.lock")] if Path("uv.lock").is_file() else []), _PROJECT]
    return [Path("requirements.txt")] if Path("requirements.txt").is_file() else []


def _asked_for(inputs: Sequence[Path]) -> list[str]:
    """The repository's own requirements, as texts."""
    if _PROJECT in inputs:
        import tomllib

        project = tomllib.loads(_PROJECT.read_text()).get("project", {})
        return [str(text) for text in project.get("dependencies", [])]
    lines = [re.split(r"\s#|\s--", line)[0].strip() for path in inputs for line in path.read_text().splitlines()]
    return [line for line in lines if line[:1].isalnum()]


def _is_package() -> bool:
    return _has_table("build-system")


def _has_table(name: str) -> bool:
    return _PROJECT.is_file() and re.search(rf"^\s*\[{name}\]", _PROJECT.read_text(), re.MULTILINE) is not None


def _names_in(venv: Path) -> list[str]:
    """Distributions installed in the environment itself."""
    found = venv.glob("lib*/python3.*/site-packages/*.dist-info")
    return sorted({_plain(path.name.removesuffix(".dist-info").rpartition("-")[0]) for path in found})


def _packages(python: str, *requirements: str) -> dict[str, Any]:
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


def _uv(*arguments: str, text: str = "") -> str:
    """Run uv with `text` as its stdin; what it printed."""
    environment = {**_UV, **os.environ, "UV_NO_PROGRESS": "1"}
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


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.replace(path)


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
