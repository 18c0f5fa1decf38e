"""What a build of the standard container is made from: files of ours, of a site and of Spack, as one archive.

    Dockerfile, setup/, entrypoints/, requirements.txt -+
    a site's folder, or this machine's certificates ----+-> Context -> digest (identity), archive (for the engine)
    a checkout of Spack and of its packages ------------+

Only content counts: no times, no owners, of a checkout what is committed.
"""

import hashlib
import io
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

CERTIFICATES = Path("/usr/local/share/ca-certificates")
"""Where Debian and Ubuntu keep the certificates that an administrator added."""
_HERE = Path(__file__).parent
_OURS = ("Dockerfile", "requirements.txt", "setup", "entrypoints")
_BUILD_ONLY = "site/python/"
_GIT_TIMEOUT_S = 120
_PASSWORD = re.compile(rb"://[^/\s:@]+:[^/\s@]+@|^\s*machine\s+\S+\s+login\s", re.MULTILINE)


class ContextError(Exception):
    """What was given to the build cannot be used."""


@dataclass(frozen=True)
class Checkout:
    """The committed state of a git checkout."""

    folder: Path
    commit: str
    tree: str

    @classmethod
    def of(cls, folder: Path) -> "Checkout":
        """The checkout at `folder`, or that one of its parents is. Raises `ContextError`."""
        try:
            commit, tree = _git(folder, "rev-parse", "HEAD", "HEAD^{tree}").decode().split()
        except ContextError as error:
            raise ContextError(f"`{folder}` is not a git checkout: {error}\n\nhint: `git clone` Spack there") from error
        return cls(folder, commit, tree)

    def read(self, path: str) -> bytes:
        """Content of a committed file. Raises `ContextError`."""
        return _git(self.folder, "show", f"HEAD:{path}")

    def archive(self) -> bytes:
        """All that is committed, as a tar archive."""
        return _git(self.folder, "archive", "--format=tar", "HEAD")

    @property
    def is_clean(self) -> bool:
        """False when a tracked file was changed since."""
        return not _git(self.folder, "status", "--porcelain", "--untracked-files=no")


@dataclass(frozen=True)
class Context:
    """Files by their path in the archive, and checkouts by the name of theirs."""

    files: Mapping[str, bytes]
    checkouts: Mapping[str, Checkout]

    def digest(self) -> str:
        """64 hex digits that change with any content that reaches the image."""
        total = hashlib.sha256()
        for path, content in sorted(self.files.items()):
            if not path.startswith(_BUILD_ONLY):
                total.update(f"{path}\0{hashlib.sha256(content).hexdigest()}\n".encode())
        for name, checkout in sorted(self.checkouts.items()):
            total.update(f"{name}\0{checkout.tree}\n".encode())
        return total.hexdigest()

    def write_archive(self, file: IO[bytes]) -> None:
        """Write the archive; the same content gives the same bytes, so that the engine's cache holds."""
        with tarfile.open(fileobj=file, mode="w") as archive:
            for path, content in sorted(self._all()):
                entry = tarfile.TarInfo(path)
                entry.size, entry.mode = len(content), 0o755 if path.endswith(".sh") else 0o644
                archive.addfile(entry, io.BytesIO(content))

    def _all(self) -> Iterator[tuple[str, bytes]]:
        yield from self.files.items()
        for name, checkout in self.checkouts.items():
            yield f"{name}.tar", checkout.archive()


def gather(site: Path | None, checkouts: Mapping[str, Checkout], env: Mapping[str, str]) -> Context:
    """What goes into a build on this machine. `site` is a folder as `site/README.md` tells. Raises `ContextError`."""
    files = {}
    for path in (each for name in _OURS for each in [_HERE / name, *(_HERE / name).rglob("*")]):
        if path.is_file() and "__pycache__" not in path.parts:
            files[str(path.relative_to(_HERE))] = path.read_bytes()
    files["site/README.md"] = (_HERE / "site" / "README.md").read_bytes()
    found = _site_folder(site) if site is not None else {**_certificates(), **_package_indexes(env)}
    for name, content in found.items():
        if not name.startswith(_BUILD_ONLY) and _PASSWORD.search(content):
            raise ContextError(
                f"`{name}` of the site holds a password, which would stay in the image\n\n"
                "hint: only files under `python/` are left out of the image"
            )
    return Context({**files, **found}, checkouts)


def _site_folder(folder: Path) -> dict[str, bytes]:
    parts = [folder / "root", folder / "python"]
    if not any(part.is_dir() for part in parts):
        raise ContextError(f"`{folder}` has neither `root` nor `python`\n\nhint: see `{_HERE / 'site' / 'README.md'}`")
    found = {}
    for path in (each for part in parts for each in sorted(part.rglob("*")) if each.is_file()):
        found[f"site/{path.relative_to(folder)}"] = path.read_bytes()
    return found


def _certificates() -> dict[str, bytes]:
    return {f"site/root{path}": path.read_bytes() for path in sorted(CERTIFICATES.rglob("*.crt")) if path.is_file()}


def _package_indexes(env: Mapping[str, str]) -> dict[str, bytes]:
    """Settings of pip and uv for the indexes that the environment names for either."""
    index = env.get("UV_DEFAULT_INDEX") or env.get("UV_INDEX_URL") or env.get("PIP_INDEX_URL", "")
    extra = (env.get("UV_INDEX") or env.get("UV_EXTRA_INDEX_URL") or env.get("PIP_EXTRA_INDEX_URL", "")).split()
    named = [url for url in (index, *extra) if url.startswith(("https://", "http://"))]
    if not named:
        return {}
    index_line = f"index-url = {index}\n" if index in named else ""
    extra = [url for url in extra if url in named]
    extra_line = f"extra-index-url = {' '.join(extra)}\n" if extra else ""
    quoted = ", ".join(f'"{url}"' for url in extra)
    uv = (f'index-url = "{index}"\n' if index_line else "") + (f"extra-index-url = [{quoted}]\n" if extra else "")
    return {
        f"{_BUILD_ONLY}pip.conf": f"[global]\n{index_line}{extra_line}".encode(),
        f"{_BUILD_ONLY}uv/uv.toml": uv.encode(),
    }


def _git(folder: Path, *arguments: str) -> bytes:
    # A hook or a session of git's own may have set GIT_DIR and the like.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    argv = ["git", "-c", "safe.directory=*", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(argv, env=env, capture_output=True, timeout=_GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ContextError(f"git cannot be run: {error}") from error
    if done.returncode != 0:
        raise ContextError(done.stderr.decode(errors="replace").strip() or f"git ended with {done.returncode}")
    return done.stdout
