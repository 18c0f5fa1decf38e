"""What our Python does first in a container of a Ray actor; runs as a script, knows only the standard library.

    inside.py probe KIT          one JSON line about this Python, Ray in it, and the GPUs it sees
    inside.py worker KIT ARGS    Ray's worker, with the kit behind the image's own packages

KIT is the folder with our packages and what they need. It comes last on the import path: what the image has is its own.
"""

import json
import runpy
import sys
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any


def main() -> None:
    """Probe, or become the worker."""
    verb, kit, *arguments = sys.argv[1:]
    sys.path[:1] = []
    sys.path.append(kit)
    if verb == "probe":
        print(json.dumps(_probe()))
    else:
        sys.argv[1:] = arguments
        runpy.run_module("ray._private.workers.default_worker", run_name="__main__", alter_sys=True)


def _probe() -> dict[str, Any]:
    found: dict[str, Any] = {
        "python": ".".join(map(str, sys.version_info[:3])),
        "executable": sys.executable,
        "ray": _version("ray"),
        "gpus": sum(path.name[6:].isdigit() for path in Path("/dev").glob("nvidia*")) or Path("/dev/dxg").exists(),
    }
    try:
        __import__("cluster.actor")
    except Exception as error:
        found["import_error"] = "".join(traceback.format_exception_only(error)).strip()
    return found


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
