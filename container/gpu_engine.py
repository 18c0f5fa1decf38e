"""What the Docker Engine needs for GPUs: an answer, NVIDIA's runtime or its devices, the toolkit."""

import json
import re
from collections.abc import Iterator
from typing import Any

from container.finding import Finding
from container.machine import Machine

ENGINE_QUERY = ("docker", "info", "--format", "{{json .}}")


def engine_info(machine: Machine) -> dict[str, Any] | None:
    """What the Docker Engine says of itself; None when it does not answer."""
    said = machine.run(*ENGINE_QUERY)
    if said is None:
        return None
    try:
        info: dict[str, Any] = json.loads(said.output)
    except ValueError:
        return None
    return info if info.get("ServerVersion") else None


def engine(machine: Machine) -> Iterator[Finding]:
    said = machine.run(*ENGINE_QUERY)
    if said is None:
        yield Finding("FAIL", "docker", "there is no `docker` program", "install Docker Engine")
        return
    info = engine_info(machine)
    if info is not None:
        yield Finding("PASS", "docker", f"Docker Engine {info['ServerVersion']} answers")
        return
    words = f"{said.output}\n{said.errors}"
    if "permission denied" in words:
        yield Finding(
            "FAIL",
            "docker",
            "this user may not use the Docker Engine",
            "join the group `docker`, then log in again (its members are as good as root)",
            ('sudo usermod -aG docker "$USER"',),
        )
    else:
        yield Finding(
            "FAIL",
            "docker",
            "no Docker Engine answers",
            "start it, or set `DOCKER_HOST` to where it is",
            ("sudo systemctl start docker",),
        )


def runtime(info: dict[str, Any], *, has_gpu: bool) -> Iterator[Finding]:
    devices = [device.get("ID", "") for device in info.get("DiscoveredDevices") or []]
    cdi = [device for device in devices if str(device).startswith("nvidia.com/gpu")]
    if "nvidia" in (info.get("Runtimes") or {}):
        default = " and is the default" if info.get("DefaultRuntime") == "nvidia" else ""
        yield Finding("PASS", "docker", f"the runtime `nvidia` is known{default}")
    elif cdi:
        yield Finding("PASS", "docker", f"the engine knows GPUs by CDI: {', '.join(cdi)}")
    else:
        yield Finding(
            "FAIL" if has_gpu else "INFO",
            "docker",
            "the Docker Engine has no NVIDIA runtime",
            "let the NVIDIA Container Toolkit configure it" if has_gpu else "",
            ("sudo nvidia-ctk runtime configure --runtime=docker", "sudo systemctl restart docker") if has_gpu else (),
        )


def toolkit(machine: Machine, *, has_gpu: bool) -> Iterator[Finding]:
    said = machine.run("nvidia-ctk", "--version")
    if said is None:
        yield Finding(
            "FAIL" if has_gpu else "INFO",
            "toolkit",
            "the NVIDIA Container Toolkit is not installed",
            "add NVIDIA's package repository (its installation guide says how) and install it" if has_gpu else "",
            ("sudo apt-get install nvidia-container-toolkit",) if has_gpu else (),
        )
        return
    version = re.search(r"version\s+v?(\S+)", said.output)
    yield Finding("PASS", "toolkit", f"NVIDIA Container Toolkit {version[1] if version else 'of unknown version'}")
    if not has_gpu:
        return
    sees = machine.run("nvidia-container-cli", "info")
    if sees is not None and sees.code != 0:
        first = next((line for line in sees.errors.splitlines() if line.strip()), f"exit code {sees.code}")
        yield Finding("FAIL", "toolkit", f"`nvidia-container-cli info`: {first}", "repair what is said above first")
