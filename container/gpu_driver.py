"""NVIDIA's hardware and driver on this machine: GPUs on the bus, kernel modules, device nodes, what the driver answers.

Each check takes a `Machine` and yields findings; `container.gpu` puts them in order.
"""

import re
from collections.abc import Iterator, Sequence

from container.finding import Finding
from container.machine import Machine

_NVIDIA_VENDOR = "0x10de"
_DISPLAY_CLASS = "0x03"
_CUDA = re.compile(r"(?:CUDA Version\s*:|<cuda_version>)\s*([0-9]+(?:\.[0-9]+)*)")
_KERNEL_DRIVER = re.compile(r"Kernel Module\s.*?(\d+\.\d+(?:\.\d+)*)\s")

GPU_QUERY = ("nvidia-smi", "--query-gpu=index,name,uuid,memory.total,compute_cap", "--format=csv,noheader,nounits")


def gpus_on_bus(machine: Machine) -> list[str]:
    """PCI addresses of NVIDIA's display and compute devices."""
    found = []
    for path in machine.find("/sys/bus/pci/devices/*/vendor"):
        folder = path.rpartition("/")[0]
        if (machine.read(path) or "").strip() == _NVIDIA_VENDOR and (machine.read(f"{folder}/class") or "").startswith(
            _DISPLAY_CLASS
        ):
            found.append(folder.rpartition("/")[2])
    return found


def works(machine: Machine) -> bool:
    """Whether the driver answers."""
    said = machine.run("nvidia-smi")
    return said is not None and said.code == 0


def cuda_capability(machine: Machine) -> str | None:
    """The newest CUDA version that the driver can run, such as `12.9`; None when no driver says so."""
    said = machine.run("nvidia-smi")
    found = _CUDA.search(said.output) if said is not None and said.code == 0 else None
    return found[1] if found else None


def is_older(version: str, than: str) -> bool:
    """Whether a dotted version is older than another; `12.9` and `12.9.1` are the same driver capability."""
    # Drivers state major and minor; a patch version needs no other driver.
    return _major_minor(version) < _major_minor(than)


def _major_minor(version: str) -> tuple[int, int]:
    numbers = [int(part) for part in re.findall(r"\d+", version)[:2]]
    return (numbers[0] if numbers else 0, numbers[1] if len(numbers) > 1 else 0)


def hardware(machine: Machine, on_bus: Sequence[str], works: bool) -> Iterator[Finding]:
    if on_bus:
        noun = "GPU" if len(on_bus) == 1 else "GPUs"
        yield Finding("PASS", "hardware", f"{len(on_bus)} NVIDIA {noun} on the PCI bus: {', '.join(on_bus)}")
    elif works:
        yield Finding("INFO", "hardware", "no NVIDIA GPU on the PCI bus, but the driver has one")
    else:
        under_wsl = " (under WSL the driver belongs to Windows)" if machine.find("/dev/dxg") else ""
        yield Finding(
            "FAIL",
            "hardware",
            f"this machine has no NVIDIA GPU{under_wsl}",
            "run GPU steps on another machine; without a GPU, launch with `--gpus none` or `SYGALDRY_GPU=false`",
        )


def driver(machine: Machine, required_cuda: str) -> Iterator[Finding]:
    kernel = kernel_driver(machine)
    said = machine.run("nvidia-smi")
    if kernel:
        yield Finding("PASS", "driver", f"kernel driver {kernel} is loaded")
    elif said is None:
        yield Finding(
            "FAIL",
            "driver",
            "no NVIDIA driver is installed",
            "install the driver that your distribution recommends, then reboot",
            _install_commands(machine),
        )
        return
    if said is None:
        yield Finding(
            "FAIL",
            "driver",
            "the kernel driver is loaded but there is no `nvidia-smi`",
            "install the driver's utilities of the same version",
            (f"sudo apt-get install nvidia-utils-{(kernel or '').partition('.')[0]}",),
        )
    elif said.code != 0:
        yield _broken_driver(machine, f"{said.output}\n{said.errors}", said.code)
    else:
        yield _capability(machine, required_cuda)


def _broken_driver(machine: Machine, words: str, code: int) -> Finding:
    first = next((line.strip() for line in words.splitlines() if line.strip()), f"exit code {code}")
    if "version mismatch" in words:
        return Finding(
            "FAIL",
            "driver",
            f"`nvidia-smi`: {first}",
            "the driver was upgraded under the loaded one: reboot, or load the module anew when nothing uses it",
            ("sudo rmmod nvidia_uvm nvidia_drm nvidia_modeset nvidia", "sudo modprobe nvidia"),
        )
    secure_boot = machine.run("mokutil", "--sb-state")
    if secure_boot is not None and "SecureBoot enabled" in secure_boot.output:
        return Finding(
            "FAIL",
            "driver",
            f"`nvidia-smi`: {first}",
            "Secure Boot is on and takes only signed modules: enrol the key the driver was signed with, then reboot",
            ("sudo mokutil --import /var/lib/shim-signed/mok/MOK.der",),
        )
    return Finding(
        "FAIL",
        "driver",
        f"`nvidia-smi`: {first}",
        "load the driver's module; when it is not there, the driver was not built for this kernel (`dkms status`)",
        ("sudo modprobe nvidia", 'sudo apt-get install "linux-headers-$(uname -r)"', "sudo dkms autoinstall"),
    )


def _capability(machine: Machine, required_cuda: str) -> Finding:
    capability = cuda_capability(machine)
    if capability is None:
        return Finding("WARN", "driver", "the driver does not say which CUDA version it can run")
    if is_older(capability, required_cuda):
        return Finding(
            "FAIL",
            "driver",
            f"the driver can run CUDA {capability}, wanted {required_cuda} or newer",
            "install a newer driver, or set `SYGALDRY_REQUIRED_CUDA_VERSION` when your image needs less",
            _install_commands(machine),
        )
    return Finding("PASS", "driver", f"the driver can run CUDA {capability} (wanted {required_cuda} or newer)")


def kernel_driver(machine: Machine) -> str | None:
    found = _KERNEL_DRIVER.search(machine.read("/proc/driver/nvidia/version") or "")
    return found[1] if found else None


def _install_commands(machine: Machine) -> tuple[str, ...]:
    system = machine.read("/etc/os-release") or ""
    if re.search(r"^ID=ubuntu$", system, re.MULTILINE):
        return ("sudo apt-get update", "sudo ubuntu-drivers install", "sudo reboot")
    if re.search(r"^ID=debian$", system, re.MULTILINE):
        return ("sudo apt-get update", "sudo apt-get install nvidia-driver firmware-misc-nonfree", "sudo reboot")
    return ()


def modules(machine: Machine) -> Iterator[Finding]:
    loaded = {line.split(maxsplit=1)[0] for line in (machine.read("/proc/modules") or "").splitlines() if line.strip()}
    if "nouveau" in loaded:
        yield Finding(
            "FAIL",
            "nouveau",
            "the module `nouveau` is loaded and keeps NVIDIA's driver from the GPU",
            "forbid `nouveau`, then reboot",
            (
                r"printf 'blacklist nouveau\noptions nouveau modeset=0\n' | sudo tee /etc/modprobe.d/no-nouveau.conf",
                "sudo update-initramfs -u",
                "sudo reboot",
            ),
        )
    else:
        yield Finding("PASS", "nouveau", "the module `nouveau` is not loaded")
    if "nvidia" not in loaded:
        if not machine.read("/proc/driver/nvidia/version"):
            yield Finding("FAIL", "modules", "the module `nvidia` is not loaded", "load it", ("sudo modprobe nvidia",))
            return
        yield Finding("INFO", "modules", "the NVIDIA driver is part of the kernel, not a module")
    else:
        names = sorted(name for name in loaded if name.startswith("nvidia"))
        yield Finding("PASS", "modules", f"loaded: {', '.join(names)}")
        if "nvidia_uvm" not in loaded:
            yield Finding(
                "WARN",
                "modules",
                "the module `nvidia_uvm`, which CUDA needs, is not loaded",
                "load it; `nvidia-persistenced` does so at every start",
                ("sudo modprobe nvidia_uvm",),
            )


def devices(machine: Machine) -> Iterator[Finding]:
    nodes = [*machine.find("/dev/nvidia[0-9]*"), *machine.find("/dev/nvidiactl"), *machine.find("/dev/nvidia-uvm")]
    missing = [
        name
        for name, there in (
            ("/dev/nvidia0", any(re.fullmatch(r"/dev/nvidia\d+", node) for node in nodes)),
            ("/dev/nvidiactl", "/dev/nvidiactl" in nodes),
            ("/dev/nvidia-uvm", "/dev/nvidia-uvm" in nodes),
        )
        if not there
    ]
    closed = [node for node in nodes if not machine.may_use(node)]
    if missing:
        yield Finding(
            "FAIL",
            "devices",
            f"device nodes are missing: {', '.join(missing)}",
            "have them made; `nvidia-persistenced` does so at every start",
            ("sudo nvidia-modprobe -c 0 -u",),
        )
    if closed:
        yield Finding(
            "FAIL",
            "devices",
            f"this user may not use {', '.join(closed)}",
            "join the group that owns them (`ls -l /dev/nvidia*`), then log in again",
            (f'sudo usermod -aG "$(stat -c %G {closed[0]})" "$USER"',),
        )
    if not missing and not closed:
        yield Finding("PASS", "devices", f"device nodes: {', '.join(nodes)}")


def gpus(machine: Machine, on_bus: Sequence[str]) -> Iterator[Finding]:
    said = machine.run(*GPU_QUERY)
    rows = [line for line in (said.output if said and said.code == 0 else "").splitlines() if line.strip()]
    for row in rows:
        index, name, uuid, memory, capability = ([*(cell.strip() for cell in row.split(",")), *[""] * 5])[:5]
        yield Finding(
            "INFO", "gpu", f"GPU {index}: {name}, {memory} MiB, compute capability {capability or '?'}, {uuid}"
        )
    if not rows:
        yield Finding("FAIL", "gpu", "the driver lists no GPU", "look for `NVRM` in the kernel's log (`sudo dmesg`)")
    elif len(rows) < len(on_bus):
        yield Finding(
            "WARN",
            "gpu",
            f"{len(on_bus)} GPUs are on the bus, the driver lists {len(rows)}",
            "one failed or belongs to another driver: look for `NVRM` and `vfio` in the kernel's log (`sudo dmesg`)",
        )
