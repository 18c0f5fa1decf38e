"""What a name of an image stands for in one run: decided at its first use, in a file beside the run's logs.

    <log_dir>/<workflow>/<run>/image-<hash of the name>.json

A tag that moves during the run changes nothing for it, and an attempt that is found again is in the same image.
"""

import hashlib
import json
from pathlib import Path

from cluster.shape import IMAGE_LABEL, ResourceShape
from steps import StepRequest
from steps._files import attempt_dir, read_json, write_once


def pinned_shape(shape: ResourceShape, request: StepRequest) -> ResourceShape:
    """The shape in the image of this run; unchanged without an image, or before the first use of its name."""
    content = read_json(_file(request, shape.image)) if shape.image else None
    return shape if content is None else _within(shape, request, content["pinned"])


def pin(shape: ResourceShape, request: StepRequest, pinned: str) -> ResourceShape:
    """Decide what the shape's image stands for in the run, unless it is decided; the shape in that image."""
    file = _file(request, shape.image)
    write_once(file, json.dumps({"image": shape.image, "pinned": pinned}))
    return pinned_shape(shape, request)


def _within(shape: ResourceShape, request: StepRequest, pinned: str) -> ResourceShape:
    name, _, value = pinned.partition("=")
    if name == IMAGE_LABEL:
        return shape.model_copy(update={"pinned": pinned, "labels": {**shape.labels, IMAGE_LABEL: value}})
    is_inside = Path(request.working_dir).is_relative_to(request.plan_dir)
    mounts = (request.plan_dir,) if is_inside else (request.plan_dir, request.working_dir)
    secrets = tuple(sorted(set(request.secrets.values())))
    return shape.model_copy(update={"pinned": pinned, "mounts": mounts, "secrets": secrets})


def _file(request: StepRequest, image: str) -> Path:
    digest = hashlib.sha256(image.encode()).hexdigest()[:16]
    return attempt_dir(request).parent.parent / f"image-{digest}.json"
