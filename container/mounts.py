"""What of the host a standard container sees: the mount table, and mounts that a plan adds.

<root>/monorepo_home -> home     <root>/spack_store, bazel_cache, hf_cache -> /opt/...
workspace            -> /workspace                   /etc/passwd, /etc/group -> the same, read-only
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

HOME = "/home/kvothe"
WORKSPACE = "/workspace"
ENTRYPOINTS = "/opt/sygaldry/entrypoints"
HF_HOME = "/opt/hf_cache"
STORE = "/opt/spack_store"
"""Of Spack, shared by its environments."""
STORE_VARIABLE = "SYGALDRY_SPACK_STORE"
"""Where it is elsewhere."""

_OF_ROOT = {
    "monorepo_home": HOME,
    "spack_store": STORE,
    "bazel_cache": "/opt/bazel_cache",
    "hf_cache": HF_HOME,
}
_HOST_ONLY = ("config", "logs")
_ACCOUNTS = ("/etc/passwd", "/etc/group")


class Mount(NamedTuple):
    """A file or folder of the host and where the container sees it."""

    host: str
    container: str
    read_only: bool = False


def container_root(env: Mapping[str, str], project_id: str) -> Path:
    """Where a project keeps its caches: `SYGALDRY_CONTAINER_ROOT`, else `sygaldry/<project_id>` of the XDG state."""
    if env.get("SYGALDRY_CONTAINER_ROOT"):
        return Path(env["SYGALDRY_CONTAINER_ROOT"])
    state = env.get("XDG_STATE_HOME") or str(Path(env.get("HOME") or Path.home()) / ".local" / "state")
    return Path(state) / "sygaldry" / project_id


def project_id(named: str, workspace: Path) -> str:
    """The project: as it is named, else after the workspace's folder. Raises `ValueError`; it becomes a folder."""
    if named and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", named):
        raise ValueError(
            f"project_id `{named}` is not a plain name\n\nhint: letters, digits, `.`, `_` and `-`; it names a folder"
        )
    return named or re.sub(r"[^A-Za-z0-9._-]+", "-", workspace.resolve().name).lstrip(".-_") or "default"


def standard_mounts(root: Path, workspace: Path) -> list[Mount]:
    """The mount table. Folders under `root` that are missing are created: the engine would make them root's."""
    for name in (*_OF_ROOT, *_HOST_ONLY):
        (root / name).mkdir(parents=True, exist_ok=True)
    return [
        *(Mount(str((root / name).resolve()), goal) for name, goal in _OF_ROOT.items()),
        Mount(str(workspace.resolve()), WORKSPACE),
        Mount(str(Path(__file__).parent / "entrypoints"), ENTRYPOINTS, read_only=True),
        *(Mount(path, path, read_only=True) for path in _ACCOUNTS if Path(path).is_file()),
    ]


def parse_mounts(texts: Iterable[str], folder: Path) -> list[Mount]:
    """`host:container[:ro|rw]` texts; a relative host path is relative to `folder`. Raises `ValueError`."""
    return [_parse(text, folder) for text in texts]


def _parse(text: str, folder: Path) -> Mount:
    host, _, rest = text.partition(":")
    goal, _, mode = rest.partition(":")
    if not host or not goal.startswith("/") or mode not in ("", "ro", "rw"):
        raise ValueError(f"mount `{text}` is not `host:container`, `host:container:ro` or `host:container:rw`")
    try:
        path = folder / Path(host).expanduser()
    except RuntimeError:
        raise ValueError(f"mount `{text}`: there is no user `{host.partition('/')[0]}` on this machine") from None
    if not path.exists():
        raise ValueError(f"mount `{text}`: `{path}` does not exist on this machine")
    return Mount(str(path.resolve()), goal, mode == "ro")
