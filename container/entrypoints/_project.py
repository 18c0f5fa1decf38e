"""The Python environment of a repository, over the Spack view of the container it is used in.

    orchestrate container sync -> _project.py sync      uv resolves and installs, then the result is checked
    orchestrate container run  -> _project.py run -- C  becomes C in that environment, which is made when there is none

Requirements that the view has are left out, and an environment that hides them, or needs other versions, is refused.
Runs inside the container, with the standard library alone.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from container.entrypoints import _overlay as overlay
    from container.entrypoints._overlay import Overlay, Refused, Withheld, packages, say, uv
else:
    # A script finds what lies beside it.
    import _overlay as overlay
    from _overlay import Overlay, Refused, Withheld, packages, say, uv

VENVS = Path("/opt/bazel_cache/uv_venvs")
REFUSED = 1
_PROJECT = Path("pyproject.toml")


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
        say(f"error: {refused}")
        return REFUSED
    return 0


class Project(Overlay):
    """The repository in the current folder and the environment that belongs to it in this container."""

    def __init__(self) -> None:
        super().__init__(VENVS / f"project-{overlay.active_view()[0]}")
        self._passed = self.venv / "sygaldry-passed.json"
        """What the last sync saw; only there when the check has passed."""

    def sync(self, requirements: Path | None, extras: Sequence[str], groups: Sequence[str]) -> None:
        """Make the environment what the repository asks for. Raises `Refused`."""
        with self.alone():
            inputs = [requirements] if requirements else _inputs()
            view = packages(self.python)
            self.make(view)
            self._passed.unlink(missing_ok=True)
            withheld = Withheld(view)
            if inputs:
                self._install(inputs[0], withheld, extras, groups)
            self._check(withheld, asked_for(inputs, extras, groups))
            known = {"view": view, "inputs": {str(path): _digest(path) for path in inputs}}
            overlay.write_whole(self._passed, json.dumps(known))
        names = " and ".join(map(str, inputs)) or "nothing, there is no pyproject.toml or requirements.txt"
        say(f"synced `{self.venv}` from {names}")

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
        self.refuse_hidden(Withheld(known["view"]))
        if any(_digest(Path(path)) != digest for path, digest in known["inputs"].items()):
            say("what the repository asks for has changed since; `orchestrate container sync` installs it")
        own = {"VIRTUAL_ENV": str(self.venv), "UV_PROJECT_ENVIRONMENT": str(self.venv)}
        environment = {**overlay.UV_SETTINGS, **os.environ, **own}
        environment["PATH"] = f"{self.venv}/bin:{os.environ.get('PATH', os.defpath)}"
        try:
            os.execvpe(command[0], list(command), environment)
        except OSError as error:
            say(f"error: `{command[0]}` cannot be run: {error.strerror}")
            sys.exit(127 if isinstance(error, FileNotFoundError) else 126)

    def _install(self, source: Path, withheld: Withheld, extras: Sequence[str], groups: Sequence[str]) -> None:
        options = ["--quiet", *(f"--extra={name}" for name in extras), *(f"--group={name}" for name in groups)]
        target = ("--quiet", "--python", str(self.venv_python))
        if source.name == "uv.lock":
            locked = uv("export", "--frozen", "--no-dev", "--no-emit-project", *options)
        else:
            overrides = self.venv / "sygaldry-overrides.txt"
            # Without them uv would look for a torch that suits all the rest.
            overrides.write_text("".join(f'{name} ; sys_platform == "never"\n' for name in withheld.names))
            options += ["--override", str(overrides), "--emit-index-url", "--emit-find-links"]
            locked = uv("pip", "compile", str(source), *target, *options)
        kept, left_out = withheld.leave_out(locked)
        (self.venv / "sygaldry-locked.txt").write_text(kept)
        for name in left_out:
            say(f"left out `{name}`: the view has its own")
        # From stdin, because relative paths in it mean the repository.
        uv("pip", "sync", "--allow-empty-requirements", *target, "-", text=kept)
        if _is_package():
            uv("pip", "install", "--no-deps", *target, "--editable", ".")

    def _check(self, withheld: Withheld, asked: Sequence[str]) -> None:
        seen = packages(str(self.venv_python), *asked)
        self.refuse_hidden(withheld)
        for module, origin in seen["modules"].items():
            if module in withheld.names and origin.startswith(f"{self.venv}/"):
                raise Refused(f"module `{module}` would come from `{origin}`, and the view has its own")
        if not seen["compared"]:
            say("versions are not compared with the view's: no Python here has `packaging`")
        unmet = [each for each in seen["unmet"] if each["name"] in withheld.names]
        if unmet:
            lines = [f"{each['by']} wants {each['name']}{each['wanted']}, the view has {each['got']}" for each in unmet]
            raise Refused(
                "the repository does not fit the view: " + "; ".join(lines) + "\n\n"
                "hint: ask for the view's version, or build a Spack environment that has the other one"
            )


def _inputs() -> list[Path]:
    """What says which packages a repository needs; the first decides."""
    # A project file may hold nothing but settings of tools.
    if _has_table("project"):
        return [*([Path("uv.lock")] if Path("uv.lock").is_file() else []), _PROJECT]
    return [Path("requirements.txt")] if Path("requirements.txt").is_file() else []


def asked_for(inputs: Sequence[Path], extras: Sequence[str] = (), groups: Sequence[str] = ()) -> list[str]:
    """The repository's own requirements, as texts."""
    if _PROJECT in inputs:
        import tomllib

        known = tomllib.loads(_PROJECT.read_text())
        project, of_groups = known.get("project", {}), known.get("dependency-groups", {})
        lists = [project.get("dependencies", []), *(of_groups.get(name, []) for name in groups)]
        lists += [project.get("optional-dependencies", {}).get(name, []) for name in extras]
        return [text for texts in lists for text in texts if isinstance(text, str)]
    lines = [re.split(r"\s#|\s--", line)[0].strip() for path in inputs for line in path.read_text().splitlines()]
    return [line for line in lines if line[:1].isalnum()]


def _is_package() -> bool:
    return _has_table("build-system")


def _has_table(name: str) -> bool:
    return _PROJECT.is_file() and re.search(rf"^\s*\[{name}\]", _PROJECT.read_text(), re.MULTILINE) is not None


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
