"""Where Spack runs, and the command lines that make it lock, build, find and verify there.

Environment + (Here | Inside) -> lock_command, build_command, find_command, verify_command -> argv

All of it is done by scripts in `entrypoints/`, which a standard container sees at another path than this machine.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from container.environment import Environment, EnvironmentProblem
from container.mounts import ENTRYPOINTS, STORE, STORE_VARIABLE, Mount

ENVIRONMENTS = "/opt/sygaldry/environments"
"""Where a standard container sees environments, by name."""
STORE_IN_USE = 75
"""Exit code of a build that did not get the store."""
_PASSED_ON = ("SPACK_PYTHON", "SYGALDRY_SPACK_PACKAGES", "SPACK_USER_CACHE_PATH", "SPACK_DISABLE_LOCAL_CONFIG")


class Place(Protocol):
    """A Spack, and how it sees our files."""

    @property
    def entrypoints(self) -> str:
        """Folder of our scripts."""

    @property
    def store(self) -> str:
        """Folder of the store."""

    def folder(self, environment: Environment) -> str:
        """Folder of an environment."""


@dataclass(frozen=True)
class Here:
    """A Spack on this machine."""

    spack_root: Path
    store: str = STORE
    entrypoints: str = str(Path(__file__).parent / "entrypoints")

    @classmethod
    def of(cls, env: Mapping[str, str], store: Path | None = None) -> "Here":
        """The one that `SPACK_ROOT` names; the store is `store`, `SYGALDRY_SPACK_STORE` or the standard one.

        Raises `EnvironmentProblem`.
        """
        root = env.get("SPACK_ROOT", "")
        if not root:
            raise EnvironmentProblem(
                "there is no Spack on this machine: `SPACK_ROOT` is not set\n\n"
                "hint: set it to a checkout of Spack, or leave `--here` away to use the standard container"
            )
        if not (Path(root) / "bin" / "spack").is_file():
            raise EnvironmentProblem(f"`SPACK_ROOT` is `{root}`, which holds no Spack: there is no `bin/spack`")
        chosen = Path(store or env.get(STORE_VARIABLE) or STORE).absolute()
        first = next(each for each in (chosen, *chosen.parents) if each.exists())
        if not os.access(first, os.W_OK | os.X_OK):
            raise EnvironmentProblem(
                f"the store `{chosen}` cannot be written\n\n"
                f"hint: make it and give it to yourself, or choose another with `--store` or `{STORE_VARIABLE}`"
            )
        return cls(Path(root).absolute(), str(chosen))

    def folder(self, environment: Environment) -> str:
        """Where it lies."""
        return str(environment.folder)

    def variables(self, env: Mapping[str, str]) -> dict[str, str]:
        """What the scripts need in their environment; Spack runs in this Python unless `SPACK_PYTHON` is set."""
        named = {name: env[name] for name in _PASSED_ON if env.get(name)}
        return {"SPACK_PYTHON": sys.executable, **named, "SPACK_ROOT": str(self.spack_root), STORE_VARIABLE: self.store}


@dataclass(frozen=True)
class Inside:
    """The Spack of the standard image."""

    host_store: Path | None = None
    """Host folder to use as the store; the project's own by default."""
    more: tuple[Mount, ...] = ()
    """Further mounts, such as of a mirror, or of a Spack at `/opt/spack_src`."""
    store: str = STORE
    entrypoints: str = ENTRYPOINTS

    def folder(self, environment: Environment) -> str:
        """Where `mounts` puts it."""
        return f"{ENVIRONMENTS}/{environment.name}"

    def mounts(self, environment: Environment | None) -> list[Mount]:
        """What a container needs beside the standard mounts."""
        mounts = [] if environment is None else [Mount(str(environment.folder), self.folder(environment), True)]
        if self.host_store is not None:
            self.host_store.mkdir(parents=True, exist_ok=True)
            mounts.append(Mount(str(self.host_store.absolute()), self.store))
        return [*mounts, *self.more]


def lock_command(place: Place, environment: Environment, *options: str) -> list[str]:
    """Prints the lock of the manifest as it is now; `options` are those of `spack concretize`."""
    return ["bash", f"{place.entrypoints}/_spack-lock.sh", place.folder(environment), *options]


def build_command(place: Place, environment: Environment, *options: str) -> list[str]:
    """Installs what is locked and makes the view; `options` are those of `spack install`."""
    return ["bash", f"{place.entrypoints}/spack-build.sh", place.folder(environment), *options]


def find_command(place: Place, environment: Environment | None) -> list[str]:
    """Prints name, version, hash and prefix of what is installed, of the whole store or one environment."""
    names = [] if environment is None else [environment.name]
    return ["bash", f"{place.entrypoints}/_spack-find.sh", *names]


def verify_command(place: Place, environment: Environment) -> list[str]:
    """Checks that what was built can be used; to be run by `run-job` with the environment activated.

    With CUDA its frameworks must compute on a GPU, without their Python packages must be importable.
    """
    names = sorted(spec["name"] for spec in environment.roots.values())
    frameworks = [name.removeprefix("py-") for name in ("py-torch", "py-jax") if name in names]
    if environment.uses_cuda and frameworks:
        return ["bash", f"{place.entrypoints}/verify-gpu.sh", "--frameworks", ",".join(frameworks)]
    packages = [name for name in names if name.startswith("py-")]
    return ["python3", f"{place.entrypoints}/_verify_view.py", f"{place.store}/views/{environment.name}", *packages]
