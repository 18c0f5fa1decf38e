"""The token that guards a cluster's ports: where a cluster file says it is, and what must hold for it."""

import os
import secrets
import stat
from pathlib import Path
from typing import Any

TOKEN_NAME = "auth_token"
"""Name of the file in the folder that is shipped to the nodes."""
MOUNT = "/ray-token"
"""Where nodes find that folder."""
SHORTEST = 32
"""Characters; `ensure_token` makes 64."""


class TokenError(Exception):
    """The token file is not there or does not guard anything."""


def mounted_token(config: dict[str, Any]) -> Path | None:
    """The token file on this machine that the `file_mounts` of a cluster file ship to the nodes."""
    folder = config.get("file_mounts", {}).get(MOUNT)
    return Path(folder).expanduser() / TOKEN_NAME if folder else None


def check_token(path: Path | None) -> None:
    """Raises `TokenError` unless `path` is a token that only this user can read (0600)."""
    if path is None:
        raise TokenError(f"the cluster has no token\n\nhint: `file_mounts` names the folder that becomes `{MOUNT}`")
    try:
        status = path.stat()
    except OSError as error:
        raise TokenError(
            f"no token file `{path}`: {error.strerror}\n\nhint: `orchestrate cluster token` makes one"
        ) from error
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode) or mode != 0o600 or status.st_uid != os.getuid():
        raise TokenError(
            f"token file `{path}` has mode `{mode:04o}` and owner `{status.st_uid}`, wanted `0600` and "
            f"`{os.getuid()}`\n\nhint: `chmod 600 {path}`; if others could read it, remove it and make a new one"
        )
    if len(path.read_text().strip()) < SHORTEST:
        raise TokenError(
            f"token file `{path}` holds less than {SHORTEST} characters\n\nhint: remove it, and make a new one"
        )


def ensure_token(path: Path) -> bool:
    """Make the token file (256 bits, 0600) unless it is there; True when it was made. Raises `TokenError`."""
    made = not path.exists()
    if made:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    check_token(path)
    return made
