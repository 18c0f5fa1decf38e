"""What the interpreter that runs this has installed: `python _packages.py [REQUIREMENT...]`, one JSON document.

Besides the distributions it tells which of their requirements, and of those given, are of versions that are not here.
Needs the standard library, and a `packaging` of any kind to compare versions: this interpreter's or the image's.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

MODULES = ("torch", "jaxlib")


def plain(name: str) -> str:
    """A distribution's name as all its spellings are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def inspect(requirements: list[str]) -> dict[str, Any]:
    """Folders, distributions with version and place, where torch and jaxlib would come from, unmet requirements."""
    folders = [path for path in sys.path if path.endswith(("site-packages", "dist-packages")) and Path(path).is_dir()]
    found: dict[str, importlib.metadata.Distribution] = {}
    for each in importlib.metadata.distributions(path=folders):
        found.setdefault(plain(each.metadata["Name"] or ""), each)
    asked = [(name, text) for name, each in found.items() for text in each.requires or []]
    asked += [("the repository", text) for text in requirements]
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "base": sys.base_prefix,
        "folders": folders,
        "distributions": {
            name: {"version": each.version, "folder": str(each.locate_file(""))} for name, each in found.items()
        },
        "modules": {name: _origin(name) for name in MODULES},
        "compared": _REQUIREMENT is not None,
        "unmet": [problem for by, text in asked if (problem := _unmet(by, text, found))],
    }


def _origin(module: str) -> str:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return ""
    return (spec.origin or "") if spec else ""


def _unmet(by: str, text: str, found: dict[str, importlib.metadata.Distribution]) -> dict[str, str] | None:
    """The requirement, when what it names is here in a version it does not want."""
    if _REQUIREMENT is None:
        return None
    try:
        requirement = _REQUIREMENT(text)
    except ValueError:
        return None
    here = found.get(plain(requirement.name))
    applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if here is None or not applies or requirement.specifier.contains(here.version, prereleases=True):
        return None
    return {"by": by, "name": plain(requirement.name), "wanted": str(requirement.specifier), "got": here.version}


def _requirement_class() -> Any:
    of_image = sorted(map(str, Path("/opt/sygaldry/python/lib").glob("python3.*/site-packages")))
    sys.path += of_image
    try:
        for package in ("packaging", "setuptools._vendor.packaging", "pip._vendor.packaging"):
            try:
                return importlib.import_module(f"{package}.requirements").Requirement
            except ImportError:
                continue
        return None
    finally:
        del sys.path[len(sys.path) - len(of_image) :]


_REQUIREMENT = _requirement_class()

if __name__ == "__main__":
    print(json.dumps(inspect(sys.argv[1:])))
