"""Images of ours on this machine that a Ray node of this version can be put into."""

import importlib.metadata
import os

from container.engine import EngineUnreachable, connect


def image_with_ray() -> str:
    """Name of the newest image of ours with this Ray; empty when there is none, or no engine."""
    try:
        client = connect(os.environ)
    except EngineUnreachable:
        return ""
    try:
        wanted = f"sygaldry.ray_version={importlib.metadata.version('ray')}"
        found = client.images.list(filters={"label": wanted})
    finally:
        client.close()
    tagged = [image for image in found if image.tags]
    return str(max(tagged, key=lambda image: image.attrs["Created"]).tags[0]) if tagged else ""
