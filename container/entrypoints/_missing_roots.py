"""Compares the active environment with Spack's database; runs in Spack's Python. Fails when a root is not installed."""

import sys

import spack.environment

roots = spack.environment.active_environment().concrete_roots()
missing = [root for root in roots if not root.installed]
for root in missing:
    print(f"not installed: {root.format('{name}@{version} /{hash:7}')}", file=sys.stderr)
print(f"{len(roots) - len(missing)} of {len(roots)} roots are in Spack's database")
sys.exit(1 if missing else 0)
