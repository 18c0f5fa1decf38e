"""The standard image, built when there is none of its content hash yet.

    ImageSpec -> content hash -> an image of that name? -> that one, else build -> BuiltImage

Builds go through the engine's own builder: it is in every Docker Engine and needs no plugin of the `docker` program,
which BuildKit's named contexts and secrets would. The engine's answers are passed on as they come
(`docker.errors.APIError`); what cannot be built as asked is an `ImageError`.
"""

import contextlib
import fcntl
import os
import re
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from container.image_spec import ImageError, ImageSpec, Recipe, content_hash, name_and_tag, recipe

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.images import Image

__all__ = ["BuiltImage", "ImageError", "ImageSpec", "build", "content_hash", "ensure", "images"]

BUILD_TIMEOUT_S = 4 * 3600.0
_SILENCE_TIMEOUT_S = 3600
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY")
"""The engine gives them to what a build runs and keeps them in no layer."""
_LABEL = "sygaldry."
_LINES_OF_ERROR = 40
_INSTRUCTION = re.compile(r"Step (\d+)/(\d+) : (.*)", re.DOTALL)
_NOISE = (" ---> ", "Removing intermediate container")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

Say = Callable[[str], None]
"""Takes a line of the build's output."""


@dataclass(frozen=True)
class BuiltImage:
    """An image of ours on an engine."""

    id: str
    """`sha256:...`"""
    names: tuple[str, ...]
    """Every `name:tag` it has."""
    labels: Mapping[str, str]
    """Our labels, without `sygaldry.`: `content_hash`, `ray_version`, `python_version`, `environment` ..."""
    label: str
    """What a Ray node in this image carries as its label `image`."""
    size_bytes: int
    created_at: str

    @property
    def content_hash(self) -> str:
        """64 hex digits."""
        return self.labels["content_hash"]


def ensure(client: "DockerClient", spec: ImageSpec, say: Say, *, timeout_s: float = BUILD_TIMEOUT_S) -> BuiltImage:
    """The image of `spec`: the one there is, else built now; of several processes that ask, one builds."""
    wanted = recipe(spec, _base_digest(client, spec, say))
    deadline = time.monotonic() + timeout_s
    found = _find(client, wanted)
    if found is None:
        with _only_one(wanted.content_hash, deadline):
            found = _find(client, wanted)
            if found is None:
                return _build(client, wanted, say, deadline, use_cache=True)
    if spec.name not in found.names:
        client.api.tag(found.id, *name_and_tag(spec.name), force=True)
        found = _of(client.images.get(found.id))
    return found


def build(
    client: "DockerClient", spec: ImageSpec, say: Say, *, timeout_s: float = BUILD_TIMEOUT_S, use_cache: bool = True
) -> BuiltImage:
    """Build the image of `spec` though there may be one; `use_cache` allows layers of earlier builds."""
    wanted = recipe(spec, _base_digest(client, spec, say))
    deadline = time.monotonic() + timeout_s
    with _only_one(wanted.content_hash, deadline):
        return _build(client, wanted, say, deadline, use_cache=use_cache)


def images(client: "DockerClient") -> list[BuiltImage]:
    """Our images on this engine, the newest first."""
    ours = [_of(image) for image in client.images.list(filters={"label": f"{_LABEL}content_hash"})]
    return sorted((each for each in ours if each.names), key=lambda each: each.created_at, reverse=True)


def _find(client: "DockerClient", wanted: Recipe) -> BuiltImage | None:
    from docker.errors import ImageNotFound

    try:
        found = _of(client.images.get(wanted.content_name))
    except ImageNotFound:
        return None
    return found if found.labels.get("content_hash") == wanted.content_hash else None


def _of(image: "Image") -> BuiltImage:
    labels = {name.removeprefix(_LABEL): value for name, value in image.labels.items() if name.startswith(_LABEL)}
    env = dict(entry.partition("=")[::2] for entry in image.attrs["Config"].get("Env") or [])
    return BuiltImage(
        id=str(image.id),
        names=tuple(image.tags),
        labels=labels,
        label=env.get("SYGALDRY_IMAGE_LABEL", ""),
        size_bytes=int(image.attrs.get("Size", 0)),
        created_at=str(image.attrs.get("Created", "")),
    )


def _base_digest(client: "DockerClient", spec: ImageSpec, say: Say) -> str:
    """What the base's name means now: a registry's digest, else the id. The base is pulled when it is nowhere."""
    from docker.errors import APIError, ImageNotFound

    try:
        base = client.images.get(spec.base)
    except ImageNotFound:
        # On a machine that pulled our image there need not be the base under its own name.
        for image in images(client):
            if image.labels.get("base") == spec.base and spec.name in image.names:
                return image.labels.get("base_digest", "")
        say(f"base `{spec.base}` is not on this machine; pulling it")
        try:
            base = client.images.pull(spec.base)
        except APIError as error:
            raise ImageError(
                f"base `{spec.base}` is not on this machine and cannot be pulled: {error.explanation or error}\n\n"
                "hint: log in to its registry, or name another base with apt"
            ) from error
    known: list[str] = base.attrs.get("RepoDigests") or []
    return next(iter(sorted(entry.rpartition("@")[2] for entry in known)), str(base.id))


def _build(client: "DockerClient", wanted: Recipe, say: Say, deadline: float, *, use_cache: bool) -> BuiltImage:
    say(f"building `{wanted.content_name}` from `{wanted.spec.base}`")
    for checkout in wanted.context.checkouts.values():
        if not checkout.is_clean:
            say(f"changes in `{checkout.folder}` that are not committed are left out")
    proxies = {name: os.environ[name] for each in _PROXIES for name in (each, each.lower()) if os.environ.get(name)}
    with tempfile.TemporaryFile() as archive, _hung_up_at_the_end(client):
        wanted.context.write_archive(archive)
        archive.seek(0)
        answers = client.api.build(
            fileobj=archive,
            custom_context=True,
            tag=wanted.content_name,
            buildargs={**dict(sorted(wanted.build_arguments.items())), **proxies},
            network_mode=wanted.spec.network,
            nocache=not use_cache,
            rm=True,
            forcerm=True,
            decode=True,
            timeout=_SILENCE_TIMEOUT_S,
        )
        _follow(answers, wanted, say, deadline)
    built = client.images.get(wanted.content_name)
    built.tag(*name_and_tag(wanted.spec.name), force=True)
    built.reload()
    return _of(built)


def _follow(answers: Iterable[dict[str, Any]], wanted: Recipe, say: Say, deadline: float) -> None:
    """Pass the build's lines on until it has ended. Raises `ImageError`."""
    last: deque[str] = deque(maxlen=_LINES_OF_ERROR)
    instruction, rest = "", ""
    for answer in answers:
        if time.monotonic() > deadline:
            raise ImageError(f"`{wanted.content_name}` is not built in time; it was at {instruction}\n\n{_end(last)}")
        if "error" in answer:
            said = str(answer["error"]).strip()
            raise ImageError(f"`{wanted.content_name}` cannot be built: {instruction}: {said}\n\n{_end(last)}")
        text = str(answer.get("stream", ""))
        if found := _INSTRUCTION.match(text):
            instruction = f"`{found[3].strip()}` (step {found[1]} of {found[2]})"
            last.clear()
        *lines, rest = (rest + text).split("\n")
        for line in (_COLOUR.sub("", line).rstrip() for line in lines):
            if line and not line.startswith(_NOISE):
                last.append(line)
                say(line)


def _end(lines: Iterable[str]) -> str:
    return "the end of its output:\n" + "\n".join(f"  {line}" for line in lines)


@contextlib.contextmanager
def _hung_up_at_the_end(client: "DockerClient") -> Iterator[None]:
    """Close answers that are not read to their end, which tells the engine to stop the build."""
    answers: list[Any] = []
    hooks: list[Any] = client.api.hooks["response"]

    def keep(response: Any, *_: object, **__: object) -> None:
        answers.append(response)

    hooks.append(keep)
    try:
        yield
    finally:
        hooks.remove(keep)
        for answer in answers:
            answer.close()


@contextlib.contextmanager
def _only_one(name: str, deadline: float) -> Iterator[None]:
    """Held by one process of this user at a time. Raises `ImageError` when that takes past `deadline`."""
    path = Path(tempfile.gettempdir()) / f"sygaldry-image-{os.getuid()}-{name[:16]}.lock"
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who held it may have removed the file after we opened it.
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                break
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise ImageError(f"another process still builds this image; it holds `{path}`")
        time.sleep(0.5)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
