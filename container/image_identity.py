"""What an image is, whatever it is called: for keys of results that depend on it.

name -> this machine's engine -> content hash of an image of ours, else the image's id
"""

import threading
import time
from collections.abc import Mapping

from container.engine_socket import EngineError, EngineSocket

_FRESH_S = 1.0
_known: dict[tuple[str, str], tuple[float, str]] = {}
_lock = threading.Lock()


def image_identity(name: str, env: Mapping[str, str]) -> str:
    """Hash of what the image is made of, its Spack environment's lock included; empty where this machine has no such
    image. Asked at most once a second: many steps of a plan name the same.
    """
    key = (name, env.get("DOCKER_HOST", ""))
    with _lock:
        asked_at, identity = _known.get(key, (float("-inf"), ""))
        if time.monotonic() - asked_at > _FRESH_S:
            identity = _ask(name, env)
            _known[key] = (time.monotonic(), identity)
    return identity


def _ask(name: str, env: Mapping[str, str]) -> str:
    try:
        found = EngineSocket(env).inspect_image(name)
    except (EngineError, ValueError):
        return ""
    labels = (found.get("Config") or {}).get("Labels") or {}
    return str(labels.get("sygaldry.content_hash") or found.get("Id", ""))
