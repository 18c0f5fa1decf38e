"""The diagnosis of GPUs, on machines that were recorded and on this one."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from container.finding import document, fixes, has_problems
from container.gpu import diagnose
from container.gpu_choice import GpuChoice, choose, parse_gpus, required_cuda
from container.gpu_driver import cuda_capability, is_older
from container.launch import LaunchError
from container.machine import Ran, RecordedMachine, ThisMachine

SMI = """\
Thu Jul  3 09:12:44 2025
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 575.57.08              Driver Version: 575.57.08      CUDA Version: 12.9     |
|-----------------------------------------+------------------------+----------------------+
"""
VERSION = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release Build\nGCC version:\n"
MODULES = "nvidia_uvm 3891200 0 - Live 0x0\nnvidia_drm 139264 4 - Live 0x0\nnvidia 14376960 99 nvidia_uvm - Live 0x0\n"
GPU_QUERY = "nvidia-smi --query-gpu=index,name,uuid,memory.total,compute_cap --format=csv,noheader,nounits"
DOCKER = "docker info --format {{json .}}"
PCI = "/sys/bus/pci/devices/0000:01:00.0"

COMMANDS = {
    "nvidia-smi": Ran(0, SMI),
    GPU_QUERY: Ran(0, "0, NVIDIA L4, GPU-5a1b2c3d-0000-1111-2222-333344445555, 23034, 8.9\n"),
    DOCKER: Ran(0, json.dumps({"ServerVersion": "28.2.2", "Runtimes": {"runc": {}, "nvidia": {}}})),
    "nvidia-ctk --version": Ran(0, "NVIDIA Container Toolkit CLI version 1.17.8\ncommit: f202b80\n"),
    "nvidia-container-cli info": Ran(0, "NVRM version:   575.57.08\nCUDA version:   12.9\n"),
}
FILES = {
    "/proc/driver/nvidia/version": VERSION,
    "/proc/modules": MODULES,
    "/etc/os-release": "NAME=Ubuntu\nID=ubuntu\n",
    f"{PCI}/vendor": "0x10de\n",
    f"{PCI}/class": "0x030200\n",
    **dict.fromkeys(("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"), ""),
}


def machine(commands=None, files=None, forbidden=()):
    """A machine with one working GPU, but for what is given; None takes something away."""

    def merged(known, changes):
        return {key: value for key, value in {**known, **(changes or {})}.items() if value is not None}

    return RecordedMachine(merged(COMMANDS, commands), merged(FILES, files), frozenset(forbidden))


def test_a_machine_where_all_is_well():
    findings = diagnose(machine())
    assert not has_problems(findings) and fixes(findings) == []
    assert {finding.level for finding in findings} == {"PASS", "INFO"}
    text = "\n".join(finding.message for finding in findings)
    for words in ("1 NVIDIA GPU", "575.57.08", "CUDA 12.9", "NVIDIA L4", "23034 MiB", "28.2.2", "1.17.8", "nvidia_uvm"):
        assert words in text


NO_DRIVER = {"nvidia-smi": None, GPU_QUERY: None}
NO_MODULE = {"/proc/driver/nvidia/version": None, "/proc/modules": "ext4 1 0 - Live 0x0\n"}
DEAD = Ran(9, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n")


@pytest.mark.parametrize(
    ("commands", "files", "check", "message", "fix"),
    [
        (NO_DRIVER, NO_MODULE, "driver", "no NVIDIA driver is installed", "ubuntu-drivers install"),
        (NO_DRIVER, {**NO_MODULE, "/etc/os-release": "ID=debian\n"}, "driver", "no NVIDIA driver", "nvidia-driver"),
        (NO_DRIVER, {}, "driver", "no `nvidia-smi`", "nvidia-utils-575"),
        ({"nvidia-smi": DEAD}, NO_MODULE, "driver", "couldn't communicate", "modprobe nvidia"),
        (
            {"nvidia-smi": DEAD, "mokutil --sb-state": Ran(0, "SecureBoot enabled\n")},
            NO_MODULE,
            "driver",
            "couldn't communicate",
            "mokutil --import",
        ),
        (
            {"nvidia-smi": Ran(18, "Failed to initialize NVML: Driver/library version mismatch\n")},
            {},
            "driver",
            "version mismatch",
            "rmmod nvidia_uvm",
        ),
        ({"nvidia-smi": Ran(0, SMI.replace("12.9", "12.2"))}, {}, "driver", "CUDA 12.2, wanted 12.9", "ubuntu-drivers"),
        ({"nvidia-smi": DEAD}, NO_MODULE, "modules", "`nvidia` is not loaded", "modprobe nvidia"),
        ({}, {"/proc/modules": MODULES + "nouveau 1 0 - Live 0x0\n"}, "nouveau", "`nouveau` is loaded", "blacklist"),
        ({}, {"/dev/nvidia-uvm": None}, "devices", "missing: /dev/nvidia-uvm", "nvidia-modprobe"),
        ({GPU_QUERY: Ran(0, "\n")}, {}, "gpu", "lists no GPU", ""),
        ({DOCKER: None}, {}, "docker", "no `docker` program", ""),
        (
            {DOCKER: Ran(1, '{"ServerErrors":["permission denied"]}')},
            {},
            "docker",
            "may not use",
            "usermod",
        ),
        ({DOCKER: Ran(1, '{"ServerErrors":["Cannot connect"]}')}, {}, "docker", "no Docker Engine", "systemctl start"),
        (
            {DOCKER: Ran(0, '{"ServerVersion": "20.10.24", "Runtimes": {"runc": {}}}')},
            {},
            "docker",
            "no NVIDIA runtime",
            "nvidia-ctk runtime configure",
        ),
        ({"nvidia-ctk --version": None}, {}, "toolkit", "not installed", "install nvidia-container-toolkit"),
        (
            {"nvidia-container-cli info": Ran(1, "", "nvidia-container-cli: initialization error: nvml error\n")},
            {},
            "toolkit",
            "initialization error",
            "",
        ),
    ],
)
def test_what_is_wrong_is_found_and_what_helps_is_said(commands, files, check, message, fix):
    findings = diagnose(machine(commands, files))
    found = [each for each in findings if each.level == "FAIL" and each.check == check and message in each.message]
    assert found and has_problems(findings), findings
    assert found[0].hint or check == "toolkit"
    assert fix in "\n".join(found[0].fix)


def test_a_device_that_is_not_ours_to_use():
    findings = diagnose(machine(forbidden=["/dev/nvidia0"]))
    assert [each.message for each in findings if each.level == "FAIL"] == ["this user may not use /dev/nvidia0"]


def test_warnings_are_no_problems():
    two_on_bus = {
        "/sys/bus/pci/devices/0000:02:00.0/vendor": "0x10de",
        "/sys/bus/pci/devices/0000:02:00.0/class": "0x030000",
    }
    without_uvm = {"/proc/modules": "nvidia 14376960 99 - Live 0x0\n"}
    findings = diagnose(machine(files={**two_on_bus, **without_uvm}))
    assert [each.check for each in findings if each.level == "WARN"] == ["modules", "gpu"]
    assert document(findings)["ok"] is True and document(findings)["counts"]["WARN"] == 2


def test_a_machine_without_a_gpu_is_told_in_one_line():
    bare = RecordedMachine({DOCKER: Ran(0, '{"ServerVersion": "28.2.2", "Runtimes": {"runc": {}}}')}, {})
    findings = diagnose(bare)
    assert [each.message for each in findings if each.level == "FAIL"] == ["this machine has no NVIDIA GPU"]
    assert fixes(findings) == []


def test_gpus_by_cdi_need_no_runtime():
    info = {"ServerVersion": "28.2.2", "DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=0"}]}
    findings = diagnose(machine({DOCKER: Ran(0, json.dumps(info))}))
    assert not has_problems(findings) and any("by CDI" in finding.message for finding in findings)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (SMI, "12.9"),
        ("CUDA Version                   : 13.0\n", "13.0"),
        ("<cuda_version>12.4</cuda_version>", "12.4"),
        ("", None),
    ],
)
def test_the_driver_says_what_it_can_run_in_several_ways(text, version):
    assert cuda_capability(RecordedMachine({"nvidia-smi": Ran(0, text)})) == version


@given(st.tuples(*[st.integers(0, 30)] * 2), st.tuples(*[st.integers(0, 30)] * 2), st.integers(0, 9))
def test_versions_are_compared_as_numbers(one, other, patch):
    assert is_older(f"{one[0]}.{one[1]}.{patch}", f"{other[0]}.{other[1]}") == (one < other)


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("all", GpuChoice(gpu=True)),
        ("none", GpuChoice()),
        ("2", GpuChoice(gpu=True, count=2)),
        ("device=0", GpuChoice(gpu=True, ids=("0",))),
        ("0,1", GpuChoice(gpu=True, ids=("0", "1"))),
        ("GPU-5a1b,MIG-0/1/2", GpuChoice(gpu=True, ids=("GPU-5a1b", "MIG-0/1/2"))),
    ],
)
def test_gpus_are_named_in_docker_s_ways(text, choice):
    assert parse_gpus(text) == choice


@given(st.text(alphabet="alnoe012,=GPU- ", max_size=8))
def test_every_other_text_is_refused(text):
    try:
        choice = parse_gpus(text)
    except ValueError as error:
        assert f"`{text}`" in str(error)
    else:
        assert choice.gpu == (text != "none")


ENGINE = {"Runtimes": {"nvidia": {}}}


def test_gpus_are_given_where_there_are_some():
    said = []
    assert choose(None, {}, ENGINE, machine(), [], said.append) == GpuChoice(gpu=True) and said == []
    assert choose(None, {"SYGALDRY_GPU": "false"}, ENGINE, machine(), [], said.append) == GpuChoice() and said == []
    assert choose(None, {}, {}, machine(), [], said.append) == GpuChoice() and "no NVIDIA runtime" in said[0]
    assert choose(parse_gpus("none"), {}, ENGINE, machine(), [], said.append) == GpuChoice()
    with pytest.raises(LaunchError, match="no NVIDIA runtime"):
        choose(parse_gpus("1"), {}, {}, machine(), [], said.append)


def test_a_driver_that_is_too_old_gives_none():
    old, said = machine({"nvidia-smi": Ran(0, SMI.replace("12.9", "12.4"))}), []
    assert choose(None, {}, ENGINE, old, [], said.append) == GpuChoice()
    assert "CUDA 12.4, wanted 12.9" in said[0]
    with pytest.raises(LaunchError, match=r"CUDA 12\.4, wanted 12\.9"):
        choose(parse_gpus("all"), {}, ENGINE, old, [], said.append)
    assert choose(None, {}, ENGINE, old, ["CUDA_VERSION=12.4.1"], said.append).gpu
    assert choose(
        None, {"SYGALDRY_REQUIRED_CUDA_VERSION": "12.2"}, ENGINE, old, ["CUDA_VERSION=12.9.1"], said.append
    ).gpu
    assert (required_cuda({}), required_cuda({}, ["CUDA_VERSION=11.8.0"])) == ("12.9", "11.8.0")


def orchestrate(*arguments, **env):
    return subprocess.run(
        [sys.executable, "-m", "bridge.cli.main", "container", "diagnose", *arguments],
        env={**os.environ, "PATH": "/usr/local/bin:/usr/bin:/bin", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_this_machine_is_told_as_it_is():
    done, report = orchestrate("--fix"), orchestrate("--json")
    found = json.loads(report.stdout)
    assert done.returncode == report.returncode == (0 if found["ok"] else 1), done.stderr
    assert found["findings"][0]["check"] == "hardware"
    if not ThisMachine().find("/dev/nvidia[0-9]*"):
        assert "FAIL  hardware  this machine has no NVIDIA GPU" in done.stdout
    assert "nothing was changed" in done.stdout and "wrong" in done.stdout
    quiet = orchestrate("--quiet").stdout
    assert "PASS" not in quiet and quiet.count("FAIL") == found["counts"]["FAIL"]


def test_a_program_that_hangs_or_is_missing_is_survived(tmp_path):
    here = ThisMachine()
    assert here.run("no-such-program-anywhere") is None
    assert here.run("sh", "-c", "echo out; echo err >&2; exit 3") == Ran(3, "out\n", "err\n")
    assert ThisMachine(timeout_s=0.2).run("sleep", "60").code == 124
    assert here.read(str(tmp_path / "none")) is None and here.may_use(str(tmp_path))
