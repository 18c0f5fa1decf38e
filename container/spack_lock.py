"""Keeps a lock that Spack has printed beside its manifest, with the hash of that manifest in it.

what `_spack-lock.sh` printed -> keep -> <environment>/spack.lock
"""

import json
import os

from container.environment import MANIFEST_HASH, Environment, EnvironmentProblem


def keep(environment: Environment, printed: str) -> Environment:
    """Write the lock; the environment as it is then. Raises `EnvironmentProblem` for what is not its lock."""
    try:
        lock = json.loads(printed)
        lock["_meta"][MANIFEST_HASH] = environment.manifest_hash
        wanted, got = len(environment.specs), len(lock["roots"])
    except (ValueError, TypeError, KeyError) as error:
        raise EnvironmentProblem(f"what Spack printed is not a lock: {type(error).__name__}: {error}") from error
    if wanted != got:
        raise EnvironmentProblem(f"Spack locked {got} roots of `{environment.manifest_file}`, wanted {wanted}")
    temporary = environment.lock_file.with_name(f".{environment.lock_file.name}.{os.getpid()}")
    # A line each, so that a change can be read; Spack does not mind.
    temporary.write_text(json.dumps(lock, indent=1) + "\n")
    temporary.replace(environment.lock_file)
    return Environment(environment.folder, environment.called)
