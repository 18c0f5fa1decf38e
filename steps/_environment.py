"""The environment of a step: an allow-list of the node's own, then what the plan declares, then secrets."""

import fnmatch
import functools
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from steps._files import OUTPUTS
from steps._process import STEP_KEY_VARIABLE
from steps._request import StepRequest

ALLOWED = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "TERM", "TZ", "LANG", "LANGUAGE", "LC_*", "TMPDIR", "XDG_*",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT", "GIT_SSL_CAINFO",
    "PIP_FIND_LINKS", "UV_FIND_LINKS", "UV_CACHE_DIR", "PIP_CACHE_DIR",
    "HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_CACHE",
    "DOCKER_HOST", "DOCKER_CERT_PATH", "DOCKER_TLS_VERIFY",
    "CUDA_HOME", "LD_LIBRARY_PATH", "SPACK_ROOT", "SYGALDRY_*",
    "SPACK_ENV_VIEW", "MANPATH", "ACLOCAL_PATH", "CMAKE_PREFIX_PATH", "PKG_CONFIG_PATH",
    "ORCHESTRATE_STATE_DIR",
)  # fmt: skip
"""What of the node's environment a step sees. `ORCHESTRATE_ENV_ALLOW` (comma separated, globs) adds to it."""

OUTPUTS_VARIABLE = "STEP_OUTPUTS"
"""Names the file a step appends JSON objects to, one a line; together they are its outputs."""


def step_environment(
    request: StepRequest, secrets: Mapping[str, str], attempt_dir: Path, gpus: Sequence[str]
) -> dict[str, str]:
    """The whole environment of one attempt. Declared variables win over the node's and the gang's, secrets over all."""
    node = node_environment()
    node["PATH"] = _with_own_programs(node.get("PATH", os.defpath))
    if gpus:
        node["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return {
        **node,
        **request.gang.environment,
        **request.env,
        **{variable: secrets[name] for variable, name in request.secrets.items()},
        OUTPUTS_VARIABLE: str(attempt_dir / OUTPUTS),
        "STEP_ID": request.step_id,
        "STEP_ATTEMPT": str(request.attempt),
        STEP_KEY_VARIABLE: request.key,
    }


def node_environment() -> dict[str, str]:
    """What of this process's environment every step sees."""
    is_allowed = _allowed(os.environ.get("ORCHESTRATE_ENV_ALLOW", "")).match
    return {name: value for name, value in os.environ.items() if is_allowed(name)}


@functools.lru_cache(maxsize=8)
def _allowed(extra: str) -> re.Pattern[str]:
    patterns = [*ALLOWED, *(name.strip() for name in extra.split(",") if name.strip())]
    return re.compile("|".join(map(fnmatch.translate, patterns)))


def _with_own_programs(path: str) -> str:
    """PATH that finds `python` and the tools installed beside us even when nobody activated the environment."""
    own = os.path.dirname(sys.executable)  # noqa: PTH120 - on the path of every step
    return path if own in path.split(os.pathsep) else f"{own}{os.pathsep}{path}"
