"""The image a person's container runs: the standard one kept up to date, any other as it is or pulled.

name -> ours and built as by default? -> built again when its inputs have changed -> the image on this machine
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from container.image import ImageSpec, ensure
from container.launch import LaunchError

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.images import Image


def standard_image(
    client: "DockerClient", name: str, say: Callable[[str], None], spec: ImageSpec | None = None
) -> "Image":
    """The image `name`, which is built by `spec` (the default one) when it is that spec's, else pulled when missing.

    An image of that name which was built otherwise on purpose, from another base or environment, is taken as it is.
    Raises `LaunchError`, and `ImageError` when it cannot be built.
    """
    from docker.errors import APIError, ImageNotFound

    spec = spec or ImageSpec()
    try:
        found = client.images.get(name)
    except ImageNotFound:
        found = None
    if name == spec.name and (found is None or _is_of(found, spec)):
        return client.images.get(ensure(client, spec, say).id)
    if found is not None:
        return found
    say(f"image `{name}` is not on this machine; pulling it")
    try:
        return client.images.pull(name)
    except APIError as error:
        raise LaunchError(
            f"image `{name}` is not on this machine and cannot be pulled: {error.explanation or error}\n\n"
            "hint: `orchestrate container build --tag NAME` builds one, `orchestrate container images` lists ours"
        ) from error


def _is_of(image: "Image", spec: ImageSpec) -> bool:
    """Whether the image was asked for with the same choices, whatever their content was then."""
    wanted = {"base": spec.base, "target": spec.target, "environment": spec.environment}
    return all(image.labels.get(f"sygaldry.{name}") == value for name, value in wanted.items())
