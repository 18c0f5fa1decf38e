"""The view of an image's Spack environment in a Python process of ours, as `activate_view` of `_common.sh` in a shell.

    SYGALDRY_SPACK_ENVIRONMENT and SYGALDRY_IMAGE_LABEL, of the image -> <store>/views/<name> -> PATH ..., sys.path

Programs of the view come before the image's own, as in a shell. Its Python packages come after them: what Ray and our
own packages import is the image's.
"""

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

from container.mounts import STORE, STORE_VARIABLE

ENVIRONMENT_VARIABLE = "SYGALDRY_SPACK_ENVIRONMENT"
"""Set in an image that was built with an environment: its name."""
LABEL_VARIABLE = "SYGALDRY_IMAGE_LABEL"
"""Set in every image of ours."""


def activate_view(env: MutableMapping[str, str]) -> str:
    """Use the view of the environment that the image names, if it names one: changes `env` and `sys.path`.

    The answer is empty, or why that cannot be. A shell of this machine that names an environment is no image.
    """
    name = env.get(ENVIRONMENT_VARIABLE, "")
    if not name or not env.get(LABEL_VARIABLE):
        return ""
    view = Path(env.get(STORE_VARIABLE) or STORE) / "views" / name
    if not (view / "bin").is_dir():
        return (
            f"the image is built with the Spack environment `{name}`, which is not in the store that it sees: "
            f"there is no `{view}/bin`\n\n"
            f"hint: `orchestrate spack build {name}` in the plan's folder; nodes of a cluster need the store mounted "
            f"at `{STORE}`"
        )
    _put_first(env, "PATH", view / "bin")
    env["SPACK_ENV_VIEW"] = str(view)
    _put_first(env, "MANPATH", view / "share/man", view / "man", open_end=True)
    _put_first(env, "ACLOCAL_PATH", view / "share/aclocal")
    _put_first(env, "CMAKE_PREFIX_PATH", view)
    _put_first(env, "PKG_CONFIG_PATH", *(view / place / "pkgconfig" for place in ("lib", "lib64", "share")))
    packages = view / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    if packages.is_dir() and str(packages) not in sys.path:
        sys.path.append(str(packages))
    return ""


def _put_first(env: MutableMapping[str, str], name: str, *folders: Path, open_end: bool = False) -> None:
    """Folders at the front of a search path, once. `open_end`: an empty end stands for the system's own folders."""
    own = [str(folder) for folder in folders]
    rest = [each for each in env.get(name, "").split(os.pathsep) if each not in own]
    env[name] = os.pathsep.join(own + (rest if open_end or rest != [""] else []))
