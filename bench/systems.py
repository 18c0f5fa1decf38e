"""The measured systems behind one interface: open, measure a shape, say the memory, close.

`Peer` talks to a process that runs `runner.serve`; `Ours` calls the `orchestrate` command like a person does.
"""

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import psutil

HERE = Path(__file__).parent
START_LIMIT_S = 120
NO_IMAGE = "no image of ours with this Ray is on this machine: `orchestrate container build`, or name one with --image"


class CutOff(Exception):
    """The measured system did not answer in time."""


class Failed(Exception):
    """The measured system ended or reported an error."""


class Absent(Exception):
    """The measured system cannot be had on this machine."""


@dataclass(frozen=True)
class Sample:
    """One measurement, in seconds."""

    inside_s: float
    """Inside the runtime: from the call to the result."""
    shell_s: float | None = None
    """From the shell: from the start of the command to its end; None where only the runtime was measured."""


class System(Protocol):
    """One contender, opened afresh for each of its turns."""

    name: str
    version: str

    def open(self) -> None:
        """Start it, warm."""

    def measure(self, shape: str, count: int, limit_s: float) -> Sample | None:
        """One run; None where it has no such thing. Raises `CutOff` and `Failed`."""

    def measure_shell(self, shape: str, count: int, limit_s: float) -> float | None:
        """One run from the shell, with nothing started before; seconds."""

    def memory_mb(self) -> dict[str, float]:
        """Memory by process name; pages that processes share count once."""

    def close(self) -> None:
        """Leave no process and no file."""


class Peer:
    """A script of this folder, run by the interpreter it needs."""

    def __init__(self, name: str, python: str, script: str, *arguments: str) -> None:
        self.name, self.version = name, ""
        self._command = [python, str(HERE / script), *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    def open(self) -> None:
        self._process = self._start(self._command, stdin=subprocess.PIPE)
        answer = self._answer(START_LIMIT_S)
        if "absent" in answer:
            raise Absent(answer["absent"])
        self.version = answer["version"]

    def measure(self, shape: str, count: int, limit_s: float) -> Sample | None:
        if self._process is None:
            self.open()
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps({"shape": shape, "count": count}).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._answer(limit_s)
        return None if answer.get("unsupported") else Sample(answer["duration_s"])

    def measure_shell(self, shape: str, count: int, limit_s: float) -> float | None:
        started = time.perf_counter()
        process = self._start([*self._command, "--once", shape, str(count)], stdin=subprocess.DEVNULL)
        try:
            if process.wait(limit_s) != 0:
                raise Failed(f"{self.name} ended with exit code {process.returncode}")
        except subprocess.TimeoutExpired:
            raise CutOff from None
        finally:
            _end_group(process)
        return time.perf_counter() - started

    def memory_mb(self) -> dict[str, float]:
        if self._process is None:
            return {}
        own = psutil.Process(self._process.pid)
        found: dict[str, float] = {}
        for process in [own, *own.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                _add(found, "client" if process == own else _short_name(process.cmdline()), process)
        return found

    def close(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        if process.stdin:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        _end_group(process)

    def _start(self, command: list[str], stdin: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def _answer(self, limit_s: float) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            if not ready.select(limit_s):
                process, self._process = self._process, None
                _end_group(process)
                raise CutOff
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait(10)
            self._process = None
            raise Failed(f"{self.name} ended with exit code {code}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Ours:
    """`orchestrate`, with its state in a folder of its own. `step` is the step that every shape is made of."""

    def __init__(self, name: str, step: dict[str, Any]) -> None:
        self.name, self.version = name, version("sygaldry-ray")
        self._step = step
        self._folder = Path()

    def open(self) -> None:
        if self._step.get("image") == "":
            raise Absent(NO_IMAGE)
        self._folder = Path(tempfile.mkdtemp(prefix="bench-"))
        (self._folder / "no_op.py").write_text(
            '"""A step that does nothing."""\n\n\ndef nothing() -> None:\n    """Return."""\n'
        )
        self._orchestrate("up", limit_s=START_LIMIT_S)
        # The first run starts what the step needs: Ray and its actors.
        self.measure("fan", 8, START_LIMIT_S)

    def measure(self, shape: str, count: int, limit_s: float) -> Sample | None:
        plan = self._write_plan(shape, count)
        if shape == "cached":
            self._orchestrate(str(plan), "--json", limit_s=limit_s)
        started = time.perf_counter()
        report = json.loads(self._orchestrate(str(plan), "--json", limit_s=limit_s))
        shell_s = time.perf_counter() - started
        outcomes = {step["outcome"] for step in report["steps"]}
        if outcomes != {"succeeded"} or len(report["steps"]) != count:
            raise Failed(
                f"{len(report['steps'])} steps with outcomes {sorted(outcomes)}, wanted {count} that succeeded"
            )
        return Sample(report["duration_s"], shell_s)

    def measure_shell(self, shape: str, count: int, limit_s: float) -> float | None:
        plan = self._write_plan(shape, count)
        self._orchestrate("down", limit_s=START_LIMIT_S)
        started = time.perf_counter()
        self._orchestrate(str(plan), "--json", limit_s=limit_s)
        return time.perf_counter() - started

    def memory_mb(self) -> dict[str, float]:
        found: dict[str, float] = {}
        entries = json.loads(self._orchestrate("status", "--json", limit_s=30))["processes"]
        for entry in entries:
            with contextlib.suppress(psutil.NoSuchProcess):
                own = psutil.Process(entry["pid"])
                # The services are the supervisor's children; each is counted under its own name.
                helpers = [] if entry["name"] == "supervisor" else own.children(recursive=True)
                for process in [own, *helpers]:
                    _add(found, entry["name"], process)
        return found

    def close(self) -> None:
        if self._folder == Path():
            return
        self._orchestrate("down", limit_s=START_LIMIT_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write_plan(self, shape: str, count: int) -> Path:
        steps = []
        for number in range(count):
            step = {"id": f"step_{number}", **self._step}
            if shape == "chain" and number:
                step["depends_on"] = [f"step_{number - 1}"]
            if shape == "cached":
                step["cache"] = {"version": f"{number}"}
            steps.append(step)
        path = self._folder / f"{shape}_{count}.yaml"
        # JSON is YAML.
        path.write_text(json.dumps({"name": f"{shape}_{count}", "steps": steps}, indent=1))
        return path

    def _orchestrate(self, *arguments: str, limit_s: float) -> str:
        command = [str(Path(sys.executable).with_name("orchestrate")), *arguments]
        environment = {**os.environ, "ORCHESTRATE_HOME": str(self._folder / "home")}
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
            text=True,
        )
        try:
            output, errors = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=20)
            process.kill()
            process.communicate()
            raise CutOff from None
        if process.returncode != 0:
            raise Failed(f"`orchestrate {' '.join(arguments)}` ended with {process.returncode}: {errors[-2000:]}")
        return output


def _add(found: dict[str, float], name: str, process: psutil.Process) -> None:
    found[name] = round(found.get(name, 0.0) + process.memory_full_info().pss / 1e6, 1)


def _short_name(command: list[str]) -> str:
    if "--worker" in command:
        return "worker"
    return Path(command[0]).name if command else "?"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    # The group is the session we started, so its id is the process's.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
