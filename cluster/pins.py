"""What a name of an image stands for in one run: decided at its first use, in a file beside the run's logs.

    <log_dir>/<workflow>/<run>/image-<hash of the name>.json

An image of our own that this machine has is known by its content hash: a node whose label or engine has another one
under the name does not take the step. A tag that moves during the run changes nothing for it, and an attempt that is
found again is in the same image.

With the pin a shape gets what the actor's container sees of the plan: its folders, and the secrets it declares.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from cluster.shape import IMAGE_LABEL, ResourceShape
from container.engine_socket import EngineError, EngineSocket
from container.image_label import CONTENT_HASH_LABEL
from steps import StepRequest
from steps._files import attempt_dir, read_json, write_once
from steps._secrets import SECRETS_DIR_VARIABLE, run_secrets_dir


def pinned_shape(shape: ResourceShape, request: StepRequest) -> ResourceShape:
    """The shape in the image of this run; unchanged without an image, or before the first use of its name."""
    content = read_json(_file(request, shape.image)) if shape.image else None
    return shape if content is None else _within(shape, request, content["pinned"])


def with_content_hash(shape: ResourceShape) -> ResourceShape:
    """The shape with the hash of its image, when that is one of ours and on this machine."""
    try:
        labels = EngineSocket(os.environ).inspect_image(shape.image)["Config"]["Labels"] or {}
    except EngineError:
        return shape
    return shape.model_copy(update={"content_hash": labels.get(CONTENT_HASH_LABEL, "")})


def pin(shape: ResourceShape, request: StepRequest, pinned: str) -> ResourceShape:
    """Decide what the shape's image stands for in the run, unless it is decided; the shape in that image."""
    file = _file(request, shape.image)
    write_once(file, json.dumps({"image": shape.image, "pinned": pinned}))
    return pinned_shape(shape, request)


def _within(shape: ResourceShape, request: StepRequest, pinned: str) -> ResourceShape:
    name, _, value = pinned.partition("=")
    if name == IMAGE_LABEL:
        return shape.model_copy(
            update={"content_hash": "", "pinned": pinned, "labels": {**shape.labels, IMAGE_LABEL: value}}
        )
    is_inside = Path(request.working_dir).is_relative_to(request.plan_dir)
    mounts = (request.plan_dir,) if is_inside else (request.plan_dir, request.working_dir)
    seen = {"mounts": mounts, **_caches(request), **_secrets(request)}
    return shape.model_copy(update={"content_hash": "", "pinned": pinned, **seen})


def _caches(request: StepRequest) -> dict[str, str]:
    """The fields of a shape about the project's caches: what the `env` of a `container_job` would mean."""
    root = request.env.get("SYGALDRY_CONTAINER_ROOT", "")
    return {
        "project": request.env.get("SYGALDRY_PROJECT_ID", ""),
        "root": str(Path(request.working_dir, root)) if root else "",
    }


def _secrets(request: StepRequest) -> dict[str, Any]:
    """The fields of a shape about secrets. Files are known here when the worker is on the node, as the local one is."""
    names = sorted(set(request.secrets.values()))
    own, version = "", ""
    if names and (kept := os.environ.get(SECRETS_DIR_VARIABLE)):
        folder = str(run_secrets_dir(Path(kept), request.workflow_id).relative_to(kept))
        stamps = [[_stamp(Path(kept, place, name)) for name in names] for place in (folder, "")]
        own = folder if any(stamps[0]) else ""
        # Not of their content: whoever looks at Ray's actors would learn something about it.
        version = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]
    return {"secrets": tuple(names), "own_secrets": own, "secrets_version": version}


def _stamp(path: Path) -> str:
    """Tells one content of a file from the next; empty without a file."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_ino} {status.st_mtime_ns}"


def _file(request: StepRequest, image: str) -> Path:
    digest = hashlib.sha256(image.encode()).hexdigest()[:16]
    return attempt_dir(request).parent.parent / f"image-{digest}.json"
