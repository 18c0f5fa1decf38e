"""Whether torch and JAX compute on the GPUs of this container; started by `verify-gpu.sh`.

    nvidia-smi, nvcc -> driver and GPUs -+
    torch, JAX: each in a process of its own, as an import may crash or hang -+-> report (JSON) -> exit code 0 or 1

A `torch` folder or a `jax.py` of the repository it is started in stands for neither of them.
Knows only the standard library: it runs in whatever Python the environment has.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TORCH = """
import torch
found["version"], found["cuda"] = torch.__version__, torch.version.cuda
if not torch.cuda.is_available():
    raise RuntimeError("torch sees no GPU" + ("" if torch.version.cuda else ": it is built without CUDA"))
for index in range(torch.cuda.device_count()):
    ones = torch.ones(64, 64, device=f"cuda:{index}")
    check((ones @ ones).sum().item(), f"cuda:{index}")
    found["devices"].append(torch.cuda.get_device_name(index))
"""
JAX = """
import jax
found["version"] = jax.__version__
for device in jax.devices("gpu"):
    ones = jax.device_put(jax.numpy.ones((64, 64)), device)
    check(float((ones @ ones).sum()), str(device))
    found["devices"].append(device.device_kind)
"""
PROBES = {"torch": TORCH, "jax": JAX}
# `-c` puts the current folder before everything; -P, which would not, is Python 3.11's.
FRAME = """
import sys
sys.path[:] = [place for place in sys.path if place]
import importlib.util, json
found = {"installed": importlib.util.find_spec(NAME) is not None, "usable": False, "version": None, "devices": []}
def check(got, where):
    if got != 64.0**3:
        raise RuntimeError(f"a product computed on {where} is wrong: got {got}, wanted {64.0**3}")
if not found["installed"]:
    found["error"] = "not installed in " + sys.executable
else:
    try:
        exec(PROBE)
        found["usable"] = bool(found["devices"])
        if not found["usable"]:
            found["error"] = "sees no GPU"
    except BaseException as error:
        found["error"] = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(found))
"""
QUERY = ("index", "name", "uuid", "driver_version", "memory.total", "compute_cap")


def main() -> int:
    """Check, report, and say by the exit code whether all is well."""
    parser = argparse.ArgumentParser(prog="verify-gpu", description="Check that torch and JAX compute on the GPUs.")
    parser.add_argument("--json", action="store_true", help="print the report instead of lines for people")
    parser.add_argument("--report", type=Path, help="also write the report to this file")
    parser.add_argument("--frameworks", default="torch,jax", help="what must work (default: torch,jax)")
    parser.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="limit of each check (300)")
    parser.add_argument("--problem", action="append", default=[], help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = [name for name in given.frameworks.split(",") if name]
    if unknown := [name for name in names if name not in PROBES]:
        parser.error(f"unknown framework `{unknown[0]}`; known: {', '.join(PROBES)}")
    report = examine(names, given.timeout, given.problem)
    if given.report:
        write(given.report, json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2) if given.json else describe(report))
    return 0 if report["ok"] else 1


def examine(names: list[str], timeout_s: float, known: list[str]) -> dict[str, Any]:
    """Everything found, and in `problems` what is wrong in words, with what is known to be."""
    gpus: list[dict[str, str]] = []
    problems: list[str] = []
    lines = output(["nvidia-smi", "--query-gpu=" + ",".join(QUERY), "--format=csv,noheader,nounits"], problems)
    for line in lines.splitlines():
        values = dict(zip(QUERY, (value.strip() for value in line.split(",")), strict=False))
        if len(values) == len(QUERY):
            gpus.append(values)
    if not gpus and not problems:
        problems.append("there is no GPU: nvidia-smi lists none")
    cuda = re.search(r"CUDA Version:\s*([\d.]+)", output(["nvidia-smi"], [])) if gpus else None
    nvcc = re.search(r"release ([\d.]+)", output(["nvcc", "--version"], []))
    frameworks = {name: probe(name, timeout_s) for name in names}
    problems += known + [f"{name}: {found['error']}" for name, found in frameworks.items() if not found["usable"]]
    return {
        "ok": not problems,
        "problems": problems,
        "checked_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "image": os.environ.get("SYGALDRY_IMAGE_LABEL", ""),
        "environment": os.environ.get("SYGALDRY_SPACK_ENVIRONMENT", ""),
        "python": sys.executable,
        "driver": {"version": gpus[0]["driver_version"] if gpus else None, "cuda": cuda and cuda[1]},
        "nvcc": nvcc and nvcc[1],
        "gpus": [
            {
                "index": int(gpu["index"]),
                "name": gpu["name"],
                "uuid": gpu["uuid"],
                "memory_mib": int(gpu["memory.total"]) if gpu["memory.total"].isdigit() else None,
                "compute_capability": gpu["compute_cap"],
            }
            for gpu in gpus
        ],
        "frameworks": frameworks,
    }


def probe(name: str, timeout_s: float) -> dict[str, Any]:
    """What one framework finds, in a process of its own."""
    failed: dict[str, Any] = {"installed": None, "usable": False, "version": None, "devices": []}
    program = FRAME.replace("NAME", repr(name)).replace("PROBE", repr(PROBES[name]))
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {**failed, "error": f"no answer within {timeout_s:g} s"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {**failed, "error": f"the check ended with {done.returncode}: {last}"}
    return found


def output(argv: list[str], problems: list[str]) -> str:
    """What a program prints; when it cannot, that is added to `problems` and the text is empty."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        problems.append(f"there is no GPU in this container: no `{argv[0]}` (is the container started with GPUs?)")
        return ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problems.append(f"`{argv[0]}` cannot be run: {error}")
        return ""
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        problems.append(f"`{argv[0]}` ended with {done.returncode}: {said}")
        return ""
    return done.stdout


def describe(report: dict[str, Any]) -> str:
    """The report for people."""
    driver = report["driver"]
    lines = [f"driver {driver['version'] or '-'}  CUDA {driver['cuda'] or '-'}  nvcc {report['nvcc'] or '-'}"]
    for gpu in report["gpus"]:
        lines.append(
            f"GPU {gpu['index']}  {gpu['name']}  {gpu['memory_mib'] or '?'} MiB  sm {gpu['compute_capability']}"
        )
    for name, found in report["frameworks"].items():
        state = f"computes on {len(found['devices'])} GPU(s)" if found["usable"] else found["error"]
        lines.append(
            f"{'PASS' if found['usable'] else 'FAIL'}  {name} {found['version'] or ''}  {state}".replace("   ", "  ")
        )
    others = [problem for problem in report["problems"] if problem.partition(":")[0] not in report["frameworks"]]
    lines += [f"FAIL  {problem}" for problem in others]
    return "\n".join([*lines, "all is well" if report["ok"] else f"{len(report['problems'])} problem(s)"])


def write(path: Path, text: str) -> None:
    """Write a whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


if __name__ == "__main__":
    sys.exit(main())
