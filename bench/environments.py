"""The peers' own environments: made once by uv, pinned, kept in a cache folder."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = {
    "dagster": ["dagster==1.13.27"],
    "dbos": ["dbos==3.4.0"],
    # 3.8.8 allows every fastapi below 1.0, but does not start with 0.142 and later.
    "prefect": ["prefect==3.8.8", "fastapi<0.142"],
    "snakemake": ["snakemake==9.27.1"],
}
INSTALL_TIMEOUT_S = 600


def python_of(name: str, uv: str) -> str:
    """The interpreter of a peer's environment, which is made if it is not there."""
    requirements = REQUIREMENTS[name]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256("\n".join([version, *requirements]).encode()).hexdigest()[:10]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "orchestrate-bench" / f"{name}-{digest}"
    python, stamp = folder / "bin" / "python", folder / ".complete"
    if not stamp.exists():
        shutil.rmtree(folder, ignore_errors=True)
        for command in (
            [uv, "venv", "--quiet", "--python", sys.executable, str(folder)],
            [uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", str(python), *requirements],
        ):
            subprocess.run(command, check=True, timeout=INSTALL_TIMEOUT_S)
        stamp.touch()
    return str(python)
