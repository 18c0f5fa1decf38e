"""What must be true before an actor is placed in an image, found out on the node where that may happen.

    pool -- check_image(name, pinned, gpus) --> a task on the node: present or pulled -> labels -> probe container
                                                 -> NodeImage, kept in a file by the image's id

A tag may move: what is checked, started and told in the report is the image the name stood for when it was first used
in the run, by its digest or, when it came from no registry, by its id.
"""

import hashlib
import json
import os
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.attempt_folder import attempts_root
from cluster.plan_copies import remove_unused
from container import reaper
from container.engine import EngineUnreachable, connect
from container.engine_socket import EngineError, EngineSocket
from container.image_label import CONTENT_HASH_LABEL
from container.kit import ensure_kit, kits_root
from container.launch import LaunchError, gpu_requests
from container.worker import KIT, WorkerSpec, base_config
from steps import Frozen
from steps._files import read_json, write_whole

LOGICAL_GPUS_VARIABLE = "ORCHESTRATE_LOGICAL_GPUS"
"""Set for a Ray node whose GPUs are numbers only, as in tests: images there are not asked whether they see them."""
_PULL_TIMEOUT_S = 1800
_PROBE_TIMEOUT_S = 120.0
_NOT_FOUND = 404
# The first Python that has Ray: an image may have several.
_PROBE = (
    'for python in python3 python; do if "$python" -c "import importlib.util, sys; '
    'sys.exit(importlib.util.find_spec(\'ray\') is None)" 2>/dev/null; then exec "$python" "$@"; fi; done; exit 66'
)
_NO_RAY = 66


class NodeImage(Frozen):
    """An image on one node, and all that a container of it needs to know of the node."""

    pinned: str = ""
    """`repository@sha256:...`, or `sha256:...` for an image that came from no registry."""
    python: str = ""
    """The interpreter in the image."""
    kit: str = ""
    """Folder on the node, see `container.kit`."""
    attempts: str = ""
    """Folder on the node that holds its actors' folders."""
    devices: tuple[dict[str, Any], ...] = ()
    """How the engine is asked for the node's GPUs."""
    host_python: str = ""
    """The interpreter of the node."""
    root: str = ""
    """Where our packages lie on the node."""
    error: str = ""
    """Why no actor can be placed in the image here; the rest is empty then."""


class ImageUnfit(Exception):
    """The image cannot run an actor on this node; the text says why."""


def check_image(name: str, pinned: str, gpus: bool) -> NodeImage:
    """Look whether an actor can run here in image `name`, pulling it if needed.

    `name` may be `name@<content hash>`. `pinned` is what it stands for in this run, empty when that is to be found out.
    `gpus`: whether GPUs must be visible inside. Takes milliseconds for an image that was checked before.
    """
    try:
        return _check(name, pinned, gpus and not os.environ.get(LOGICAL_GPUS_VARIABLE))
    except (ImageUnfit, EngineUnreachable, EngineError, LaunchError, OSError) as error:
        return NodeImage(error=str(error))


def _check(name: str, pinned: str, gpus: bool) -> NodeImage:
    name, content_hash = _split(name)
    image = _present(name, pinned)
    _check_labels(image, name, content_hash)
    kit = ensure_kit(kits_root())
    root = str(Path(__file__).parent.parent)
    own = hashlib.sha256(json.dumps([image["Id"], kit.name, gpus, root, sys.executable]).encode()).hexdigest()[:32]
    known = kit.parent / "checked" / f"{own}.json"
    if content := read_json(known):
        return NodeImage.model_validate(content).model_copy(update={"pinned": _pinned(image, name)})
    found = NodeImage(
        pinned=_pinned(image, name),
        kit=str(kit),
        attempts=str(attempts_root()),
        devices=_devices() if gpus else (),
        host_python=sys.executable,
        root=root,
    )
    probed = _probe(image["Id"], found)
    _check_versions(name, python=probed["python"], ray=probed["ray"])
    if problem := probed.get("import_error"):
        raise ImageUnfit(
            f"our own packages cannot be imported in image `{name}`: {problem}\n\n"
            "hint: the image's own packages come first; one of them is too old or broken"
        )
    if gpus and not probed["gpus"]:
        raise ImageUnfit(
            f"no GPU is visible in image `{name}`, though the step asks for one\n\n"
            f"hint: `orchestrate container diagnose` on that node; `{LOGICAL_GPUS_VARIABLE}=1` in the environment of a "
            "Ray node says that its GPUs are numbers only"
        )
    found = found.model_copy(update={"python": probed["executable"]})
    known.parent.mkdir(exist_ok=True)
    write_whole(known, found.model_dump_json())
    remove_unused(attempts_root())
    return found


def _present(name: str, pinned: str) -> dict[str, Any]:
    """The image on this node, as the engine describes it; pulled when it is not there."""
    engine = EngineSocket(os.environ)
    try:
        return engine.inspect_image(pinned or name)
    except EngineError as error:
        if error.status != _NOT_FOUND:
            raise
    if pinned.startswith("sha256:"):
        raise ImageUnfit(
            f"image `{name}` is `{pinned[:19]}` in this run, and that is not on this node\n\n"
            "hint: it came from no registry, so it must be built or loaded on every node"
        )
    _pull(name, pinned or name)
    return engine.inspect_image(pinned or name)


def _pull(name: str, reference: str) -> None:
    from docker.errors import APIError

    client = connect(os.environ, _PULL_TIMEOUT_S)
    try:
        client.images.pull(reference)
    except APIError as error:
        raise ImageUnfit(
            f"image `{name}` is not on this node and cannot be pulled: {error.explanation or error}\n\n"
            "hint: build it there, or name one that exists"
        ) from error
    finally:
        client.close()


def _devices() -> tuple[dict[str, Any], ...]:
    """How the engine is asked for all GPUs of the node."""
    client = connect(os.environ)
    try:
        return tuple(dict(each) for each in gpu_requests(client.info()))
    finally:
        client.close()


def _pinned(image: Mapping[str, Any], name: str) -> str:
    repository = name.partition("@")[0]
    if ":" in repository.rpartition("/")[2]:
        repository = repository.rpartition(":")[0]
    digests: list[str] = image.get("RepoDigests") or []
    own = [each for each in digests if f"/{each.partition('@')[0]}".endswith(f"/{repository}")]
    return own[0] if own else str(image["Id"])


def _split(name: str) -> tuple[str, str]:
    """Name and content hash of `name@hash`; a registry's digest stays part of the name."""
    plain, _, given = name.partition("@")
    return (name, "") if given.startswith("sha256:") else (plain, given)


def _check_labels(image: Mapping[str, Any], name: str, content_hash: str) -> None:
    """Labels that our own images carry tell what they are without a container."""
    labels: Mapping[str, str] = image["Config"].get("Labels") or {}
    own = labels.get(CONTENT_HASH_LABEL, "")
    if content_hash and not own.startswith(content_hash):
        raise ImageUnfit(
            f"image `{name}` on this node has the content hash `{own[:16] or 'none'}`, wanted `{content_hash[:16]}`\n\n"
            "hint: build it there too, or push it to a registry that the node pulls from"
        )
    _check_versions(name, python=labels.get("sygaldry.python_version"), ray=labels.get("sygaldry.ray_version"))


def _check_versions(name: str, *, python: str | None, ray: str | None) -> None:
    """Raise `ImageUnfit` unless they are those of this node; None is unknown."""
    from importlib.metadata import version

    if ray is not None and ray != version("ray"):
        raise ImageUnfit(
            f"Ray in image `{name}` is `{ray or 'missing'}`, wanted `{version('ray')}` as on the node\n\n"
            "hint: build the image with the Ray version of the cluster"
        )
    wanted = f"{sys.version_info.major}.{sys.version_info.minor}"
    if python and ".".join(python.split(".")[:2]) != wanted:
        raise ImageUnfit(
            f"Python in image `{name}` is `{python}`, wanted `{wanted}` as on the node\n\n"
            "hint: build the image with the Python version of the cluster"
        )


def _probe(image_id: str, found: NodeImage) -> dict[str, Any]:
    """What our Python finds inside; the container gets what an actor's would get."""
    spec = WorkerSpec(
        actor=f"probe-{uuid.uuid4().hex[:12]}",
        image_id=image_id,
        python="",
        kit=found.kit,
        folder="",
        devices=found.devices,
    )
    arguments = ["sh", "-c", _PROBE, "sh", f"{KIT}/container/inside.py", "probe", KIT]
    config = {**base_config(spec, arguments, [], {}), "Labels": {reaper.OWNER_LABEL: reaper.owner()}}
    engine, started_at = EngineSocket(os.environ), time.monotonic()
    try:
        engine.create(spec.container, config)
        engine.start(spec.container)
        status = engine.wait(spec.container, _PROBE_TIMEOUT_S)
        output = engine.last_lines(spec.container, 20)
    except EngineError as error:
        if time.monotonic() - started_at >= _PROBE_TIMEOUT_S:
            raise ImageUnfit(f"a container of the image did nothing for {_PROBE_TIMEOUT_S:g} s") from error
        raise ImageUnfit(f"a container of the image cannot be started: {error}") from error
    finally:
        engine.remove(spec.container)
    if status == _NO_RAY:
        raise ImageUnfit(
            "the image has no `python3` or `python` on its PATH that has Ray\n\nhint: `orchestrate container build`"
        )
    if status:
        raise ImageUnfit(f"a container of the image ended with code {status}: {output}")
    probed: dict[str, Any] = json.loads(output.splitlines()[-1])
    return probed
