"""Adds packages to a virtual environment over the Spack view; started by `uv-install.sh`: VENV ARGUMENT...

arguments -> what uv would install -> without what the view has -> install -> check -> kept, or undone and refused
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from container.entrypoints import _overlay as overlay
    from container.entrypoints._project import asked_for
else:
    # A script finds what lies beside it.
    import _overlay as overlay
    from _project import asked_for

BUILT_AGAINST_TORCH = ("flash-attn", "causal-conv1d", "mamba-ssm", "xformers", "deepspeed")
"""Compiled against the torch that is there, so they must see it while they are built."""

ROUNDS = 3
"""How often uv is asked again without what it wanted of the view's; what is left then is refused."""


class Growing(overlay.Overlay):
    """An environment that only ever grows, in a folder of the user's."""

    def __init__(self, venv: Path) -> None:
        super().__init__(venv.absolute())

    def add(self, arguments: Sequence[str]) -> None:
        """Install what uv makes of `arguments`. Raises `Refused`."""
        with self.alone():
            view = overlay.packages(self.python)
            self._refuse_foreign()
            self.make(view)
            withheld = overlay.Withheld(view)
            overrides = self.venv / "sygaldry-overrides.txt"
            isolation = [f"--no-build-isolation-package={name}" for name in BUILT_AGAINST_TORCH]
            words = ["--python", str(self.venv_python), "--override", str(overrides), *isolation, *arguments]
            left_out = set(withheld.names)
            for _ in range(ROUNDS):
                overrides.write_text("".join(f'{name} ; sys_platform == "never"\n' for name in sorted(left_out)))
                hiding = {name for name in _planned(words) if withheld.has(name)}
                if not hiding:
                    break
                overlay.say(f"left out {', '.join(sorted(hiding))}: the view has its own")
                left_out |= hiding
            before = set(overlay.names_in(self.venv))
            overlay.uv("pip", "install", *words)
            self._check_added(withheld, before, arguments)

    def _refuse_foreign(self) -> None:
        if self.venv_python.is_symlink() and not (self.venv / "sygaldry-view.json").exists():
            raise overlay.Refused(
                f"`{self.venv}` was not made by uv-install\n\nhint: remove it, or name another by --venv"
            )

    def _check_added(self, withheld: overlay.Withheld, before: set[str], arguments: Sequence[str]) -> None:
        added = [name for name in overlay.names_in(self.venv) if name not in before]
        problems = [f"`{name}` would hide the view's own build" for name in added if withheld.has(name)]
        seen = overlay.packages(str(self.venv_python), *_requirements(arguments))
        problems += [
            f"{each['by'].replace('the repository', 'you')} want{'' if each['by'] == 'the repository' else 's'} "
            f"{each['name']}{each['wanted']}, the view has {each['got']}"
            for each in seen["unmet"]
            if each["name"] in withheld.names
        ]
        if not problems:
            return
        if added:
            overlay.uv("pip", "uninstall", "--quiet", "--python", str(self.venv_python), *added)
        raise overlay.Refused(
            "this does not fit the view: " + "; ".join(problems) + "; what was added is taken out again\n\n"
            "hint: ask for the view's version, or build a Spack environment that has the other one"
        )


def _planned(words: Sequence[str]) -> list[str]:
    """Names of what uv would install. Raises `Refused`."""
    argv = ["uv", "pip", "install", "--dry-run", "--color", "never", *words]
    environment = {**overlay.UV_SETTINGS, **os.environ}
    try:
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=overlay.INSTALL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise overlay.Refused(
            f"`uv pip install` did not say within {overlay.INSTALL_TIMEOUT_S} s what it would install"
        ) from None
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise overlay.Refused("nothing is installed: above is what uv said")
    return [overlay.plain(name) for name in re.findall(r"^ \+ ([^\s=@]+)", done.stderr, re.MULTILINE)]


def _requirements(arguments: Sequence[str]) -> list[str]:
    """Requirements among the arguments, and those in files that are named there."""
    found: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument in ("-r", "--requirement", "--requirements"):
            found += asked_for([Path(following)])
        elif not argument.startswith("-"):
            found.append(argument)
    return found


def main() -> int:
    """Install; 1 with a message when that is refused."""
    venv, *arguments = sys.argv[1:]
    growing = Growing(Path(venv))
    try:
        growing.add(arguments)
    except overlay.Refused as refused:
        overlay.say(f"error: {refused}")
        return 1
    overlay.say(
        f"installed into {os.path.relpath(growing.venv)}; use it: source {os.path.relpath(growing.venv)}/bin/activate"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
