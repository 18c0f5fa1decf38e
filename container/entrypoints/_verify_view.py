"""Checks that a view can be used: it is there, and its Python imports its packages. _verify_view.py VIEW [PACKAGE...]

PACKAGE is a Python package as Spack names it: `py-numpy`. To be run by the Python of the view, where it has one.
"""

import importlib
import importlib.metadata
import re
import sys
from collections.abc import Mapping
from pathlib import Path

NOT_ITS_OWN = ("docs", "test", "tests")
"""Modules that some packages install by mistake."""


def main() -> int:
    """Exit code: 0 when all is well."""
    view, *packages = sys.argv[1:]
    if not any(Path(view).glob("*")):
        print(f"there is nothing in the view {view}", file=sys.stderr)
        return 1
    distributions = importlib.metadata.packages_distributions() if packages else {}
    failures = [failure for package in packages for failure in check(package, distributions)]
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{view}: {len(packages)} Python packages, {len(failures)} failures")
    return 1 if failures else 0


def check(package: str, distributions: Mapping[str, list[str]]) -> list[str]:
    """What is wrong with a package: imports that fail, or that it is not there at all."""
    name = normal(package.removeprefix("py-"))
    modules = [module for module, owners in distributions.items() if name in map(normal, owners)]
    own = [module for module in modules if normal(module) == name]
    modules = own or [each for each in modules if not each.startswith("_") and each not in NOT_ITS_OWN]
    if not modules:
        return [f"{package}: {sys.executable} does not have it"]
    failures = []
    for module in modules:
        try:
            importlib.import_module(module)
            print(f"imported {module}")
        except Exception as error:
            failures.append(f"{package}: `import {module}` fails: {type(error).__name__}: {error}")
    return failures


def normal(name: str) -> str:
    """A name as package indexes compare them."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
