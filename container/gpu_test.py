"""A container with all GPUs of this machine, to see whether it sees them."""

import os
import subprocess
from collections.abc import Mapping

from container import reaper
from container.finding import Finding

_PROGRAM = "nvidia-smi"
TIMEOUT_S = 120


def run_test(env: Mapping[str, str], image: str) -> Finding:
    """Run `nvidia-smi -L` in a container of `image`, which must be on this machine; the container is removed."""
    name = f"sygaldry-gpu-test-{os.urandom(4).hex()}"
    argv = ["docker", "run", "--rm", "--pull=never", "--network=none", f"--name={name}"]
    argv += ["--label", f"{reaper.OWNER_LABEL}={reaper.owner()}", "--gpus=all", "--entrypoint", _PROGRAM, image, "-L"]
    try:
        done = subprocess.run(
            argv, env=dict(env), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except FileNotFoundError:
        return Finding("FAIL", "test", "there is no `docker` program", "install Docker Engine")
    except subprocess.TimeoutExpired:
        reaper.remove(name, env)
        return Finding("FAIL", "test", f"the container did not end within {TIMEOUT_S} s", "look at `sudo dmesg`")
    seen = [line for line in done.stdout.splitlines() if line.startswith("GPU ")]
    if done.returncode == 0 and seen:
        return Finding("PASS", "test", f"a container of `{image}` sees {len(seen)}: {'; '.join(seen)}")
    words = next((line.strip() for line in done.stderr.splitlines() if line.strip()), "it saw none")
    return Finding("FAIL", "test", f"a container of `{image}` sees no GPU: {words}", "repair what is said above first")
