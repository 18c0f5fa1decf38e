"""Why a GPU can or cannot be used in a container here. Looks, never changes anything.

hardware -> driver -> kernel modules -> device nodes -> GPUs -> Docker Engine -> its NVIDIA runtime -> toolkit
"""

from container import gpu_driver, gpu_engine
from container.finding import Finding
from container.machine import Machine

REQUIRED_CUDA = "12.9"
"""CUDA version of the standard image; what the driver must be capable of unless something else is asked for."""


def diagnose(machine: Machine, required_cuda: str = REQUIRED_CUDA) -> list[Finding]:
    """Look at everything, in the order in which one thing needs the other."""
    on_bus, works = gpu_driver.gpus_on_bus(machine), gpu_driver.works(machine)
    has_gpu = bool(on_bus) or works
    findings = list(gpu_driver.hardware(machine, on_bus, works))
    if has_gpu:
        findings += gpu_driver.driver(machine, required_cuda)
        findings += gpu_driver.modules(machine)
        findings += gpu_driver.devices(machine)
        if works:
            findings += gpu_driver.gpus(machine, on_bus)
    elif gpu_driver.kernel_driver(machine):
        findings.append(Finding("INFO", "driver", "an NVIDIA driver is loaded, with no GPU to drive"))
    findings += gpu_engine.engine(machine)
    info = gpu_engine.engine_info(machine)
    if info is not None:
        findings += gpu_engine.runtime(info, has_gpu=has_gpu)
    findings += gpu_engine.toolkit(machine, has_gpu=has_gpu)
    return findings
