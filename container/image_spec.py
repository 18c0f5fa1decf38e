"""What a standard image is made of, and the hash that tells whether there is one already.

ImageSpec + digest of the base -> recipe -> arguments of the Dockerfile + Context -> content hash
"""

import hashlib
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from container.build_context import Checkout, Context, ContextError, gather
from container.environment import EnvironmentProblem, find
from container.image_label import image_label

DEFAULT_NAME = "sygaldry/zephyr:base"
DEFAULT_BASE = "nvidia/cuda:12.9.1-cudnn-devel-ubuntu24.04"
DEFAULT_SNAPSHOT = "20260101T000000Z"
SPACK_VERSION = "v1.1.0"
SPACK_COMMIT = "2e907202bcc8209a6a62243aab50c179b524cc3b"
SPACK_PACKAGES_COMMIT = "119680aeee8ea802c6111b7167583bddef97e82f"
TARGETS = ("full", "slim")
"""With compilers, MPI, node, Go and bazelisk; or what Ray nodes, entrypoints and Spack's own parts need."""
SITE_VARIABLE = "SYGALDRY_SITE"
_REQUIREMENTS = Path(__file__).parent / "requirements.txt"
_HASH_IN_TAG = 16


class ImageError(Exception):
    """The image cannot be made as asked."""


@dataclass(frozen=True)
class ImageSpec:
    """What image is wanted; two specs of the same content hash want the same."""

    name: str = DEFAULT_NAME
    """Name and tag it gets, besides the name with its content hash as tag."""
    base: str = DEFAULT_BASE
    """Any image with apt and bash: Ubuntu 24.04, Debian 12."""
    target: str = "full"
    """One of `TARGETS`."""
    environment: str = ""
    """Name or folder of the Spack environment that its containers activate by default; the lock joins the identity."""
    python_version: str = f"{sys.version_info.major}.{sys.version_info.minor}"
    """Of the Ray node's Python, such as `3.12`, and the same all over a cluster. The base's own where that fits."""
    spack: str | Path = SPACK_VERSION
    """A tag or commit to clone, a `Path` to a git checkout, or empty for an image without Spack."""
    spack_packages: str | Path = SPACK_PACKAGES_COMMIT
    """The same for Spack's packages; when empty, Spack gets them itself when it first needs them."""
    apt_snapshot: str | None = None
    """Moment, such as `20260101T000000Z`, whose archive of Debian or Ubuntu is used; empty for the base's sources.
    None is a fixed moment for the default base and empty for others."""
    uid: int = field(default_factory=os.getuid)
    """Id of the user `kvothe`; by default this process's."""
    gid: int = field(default_factory=os.getgid)
    site: Path | None = None
    """Folder as `site/README.md` tells; by default `SYGALDRY_SITE`, else this machine's certificates and indexes."""
    network: str = "host"
    """Network of the build; it changes nothing of the image."""


@dataclass(frozen=True)
class Recipe:
    """A spec with everything read that its image depends on."""

    spec: ImageSpec
    context: Context
    arguments: Mapping[str, str]
    """Arguments of the Dockerfile that describe the content."""

    @cached_property
    def content_hash(self) -> str:
        """64 hex digits."""
        known = json.dumps([dict(self.arguments), self.context.digest()], sort_keys=True)
        return hashlib.sha256(known.encode()).hexdigest()

    @property
    def content_name(self) -> str:
        """The spec's name with the content hash as its tag."""
        return f"{name_and_tag(self.spec.name)[0]}:{self.content_hash[:_HASH_IN_TAG]}"

    @property
    def build_arguments(self) -> dict[str, str]:
        """All arguments of the Dockerfile."""
        label = image_label(self.spec.name, self.content_hash)
        return {**self.arguments, "CONTENT_HASH": self.content_hash, "IMAGE_LABEL": label}


def content_hash(spec: ImageSpec, base_digest: str = "") -> str:
    """64 hex digits over the Dockerfile and all its inputs: files by content, arguments, the digest of the base.

    Raises `ImageError`.
    """
    return recipe(spec, base_digest).content_hash


def recipe(spec: ImageSpec, base_digest: str) -> Recipe:
    """Read what `spec` names. Raises `ImageError`."""
    if spec.target not in TARGETS:
        raise ImageError(f"target: got `{spec.target}`, wanted {' or '.join(f'`{each}`' for each in TARGETS)}")
    if not re.fullmatch(r"3\.\d+", spec.python_version):
        raise ImageError(f"Python version: got `{spec.python_version}`, wanted one like `3.12`")
    site = spec.site or (Path(os.environ[SITE_VARIABLE]) if os.environ.get(SITE_VARIABLE) else None)
    sources = {"spack_src": spec.spack, "spack_packages": spec.spack_packages}
    try:
        checkouts = {name: Checkout.of(source) for name, source in sources.items() if isinstance(source, Path)}
        context = gather(site, checkouts, os.environ)
        arguments = {
            "BASE": spec.base,
            "BASE_DIGEST": base_digest,
            "TARGET": spec.target,
            "PYTHON_VERSION": spec.python_version,
            "RAY_VERSION": _ray_version(),
            "UV_VERSION": locked_version("uv"),
            "HOST_UID": str(spec.uid),
            "HOST_GID": str(spec.gid),
            "APT_SNAPSHOT": _snapshot(spec),
            **_spack(spec, checkouts),
            **_environment(spec),
        }
    except (ContextError, EnvironmentProblem) as error:
        raise ImageError(str(error)) from error
    return Recipe(spec, context, arguments)


def locked_version(package: str) -> str:
    """The version of a package in `requirements.txt`. Raises `ImageError`."""
    found = re.search(rf"^{re.escape(package)}==(\S+)", _REQUIREMENTS.read_text(), re.MULTILINE)
    if found is None:
        raise ImageError(f"`{_REQUIREMENTS}` does not lock `{package}`")
    return found[1]


def name_and_tag(name: str) -> tuple[str, str]:
    """`repository:tag` as its parts; `latest` where there is no tag."""
    repository, colon, tag = name.rpartition(":")
    return (repository, tag) if colon and "/" not in tag else (name, "latest")


def _ray_version() -> str:
    """This project's own Ray, which the lock must have: nodes of another version do not talk to ours."""
    locked, installed = locked_version("ray"), importlib.metadata.version("ray")
    if locked != installed:
        raise ImageError(
            f"Ray here is `{installed}`, but the image would get `{locked}`\n\n"
            f"hint: set the version in `{_REQUIREMENTS.with_suffix('.in')}` and lock again as told there"
        )
    return installed


def _snapshot(spec: ImageSpec) -> str:
    if spec.apt_snapshot is not None:
        return spec.apt_snapshot
    return DEFAULT_SNAPSHOT if spec.base == DEFAULT_BASE else ""


def _spack(spec: ImageSpec, checkouts: Mapping[str, Checkout]) -> dict[str, str]:
    version, commit = str(spec.spack), SPACK_COMMIT if spec.spack == SPACK_VERSION else ""
    if checkout := checkouts.get("spack_src"):
        found = re.search(rb'^__version__ = "([^"]+)"', checkout.read("lib/spack/spack/__init__.py"), re.MULTILINE)
        version, commit = found[1].decode() if found else "unknown", checkout.commit
    packages = checkouts["spack_packages"].commit if "spack_packages" in checkouts else str(spec.spack_packages)
    return {
        "SPACK_VERSION": version,
        "SPACK_COMMIT": commit,
        # Without Spack nobody needs its packages.
        "SPACK_PACKAGES_COMMIT": packages if version else "",
    }


def _environment(spec: ImageSpec) -> dict[str, str]:
    if not spec.environment:
        return {"ENVIRONMENT": "", "LOCK_HASH": ""}
    found = find(spec.environment)
    return {"ENVIRONMENT": found.name, "LOCK_HASH": found.lock_hash}
