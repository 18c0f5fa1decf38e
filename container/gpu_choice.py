"""Which GPUs a container gets: what was asked for, against what the engine knows and the driver is capable of."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from container.gpu import REQUIRED_CUDA
from container.gpu_driver import cuda_capability, is_older
from container.launch import LaunchError
from container.machine import Machine

REQUIRED_CUDA_VARIABLE = "SYGALDRY_REQUIRED_CUDA_VERSION"
WANTED_VARIABLE = "SYGALDRY_GPU"
"""`true` (the default) takes GPUs where there are some; everything else takes none."""


@dataclass(frozen=True)
class GpuChoice:
    """GPUs for one container."""

    gpu: bool = False
    count: int = 0
    """0 is all."""
    ids: tuple[str, ...] = ()


def parse_gpus(text: str) -> GpuChoice:
    """`all`, `none`, a number of GPUs, or ids: `device=0`, `0,1`, `GPU-<uuid>`. Raises `ValueError`."""
    if text in ("all", "none"):
        return GpuChoice(gpu=text == "all")
    if re.fullmatch(r"[1-9][0-9]{0,2}", text):
        return GpuChoice(gpu=True, count=int(text))
    ids = text.removeprefix("device=").split(",")
    if (len(ids) > 1 or text.startswith(("device=", "GPU-", "MIG-"))) and all(
        re.fullmatch(r"[0-9]+(:[0-9]+)?|(GPU|MIG)-[A-Za-z0-9/-]+", each) for each in ids
    ):
        return GpuChoice(gpu=True, ids=tuple(ids))
    raise ValueError(
        f"gpus is `{text}`, wanted `all`, `none`, a number of GPUs, or ids such as `device=0`, `0,1`, `GPU-...`"
    )


def required_cuda(env: Mapping[str, str], image_env: Sequence[str] = ()) -> str:
    """The CUDA version a container needs: as the environment says, else the image, else that of the standard image."""
    named = env.get(REQUIRED_CUDA_VARIABLE)
    of_image = next((each.partition("=")[2] for each in image_env if each.startswith("CUDA_VERSION=")), "")
    return named or of_image or REQUIRED_CUDA


def choose(
    asked: GpuChoice | None,
    env: Mapping[str, str],
    engine: Mapping[str, Any],
    machine: Machine,
    image_env: Sequence[str],
    warn: Callable[[str], None],
) -> GpuChoice:
    """GPUs for a container whose image has the environment `image_env`.

    What was `asked` for and cannot be had is a `LaunchError`; where nothing was, a machine without usable GPUs gives
    none, and says so. `engine` is the engine's `info`.
    """
    if asked is not None and not asked.gpu:
        return asked
    if asked is None and env.get(WANTED_VARIABLE, "true") != "true":
        return GpuChoice()
    if problem := _problem(env, engine, machine, image_env):
        if asked is not None:
            raise LaunchError(problem)
        warn(f"no GPU for this container: {problem.partition(chr(10))[0]} (`--gpus none` wants none)")
        return GpuChoice()
    return asked or GpuChoice(gpu=True)


def _problem(
    env: Mapping[str, str], engine: Mapping[str, Any], machine: Machine, image_env: Sequence[str]
) -> str | None:
    if not knows_gpus(engine):
        return (
            "this Docker Engine has no NVIDIA runtime\n\n"
            "hint: `orchestrate container diagnose` says what is missing; `--gpus none` goes without"
        )
    wanted, capability = required_cuda(env, image_env), cuda_capability(machine)
    # Without an answer of the driver there is nothing to compare: the engine will say what it cannot do.
    if capability is not None and is_older(capability, wanted):
        return (
            f"the driver can run CUDA {capability}, wanted {wanted} or newer\n\n"
            f"hint: install a newer driver, or set `{REQUIRED_CUDA_VARIABLE}` when the image needs less"
        )
    return None


def knows_gpus(engine: Mapping[str, Any]) -> bool:
    """Whether the engine can give GPUs to containers, by NVIDIA's runtime or by CDI."""
    devices = engine.get("DiscoveredDevices") or []
    return "nvidia" in (engine.get("Runtimes") or {}) or any(
        str(device.get("ID", "")).startswith("nvidia.com/gpu") for device in devices
    )
