"""Runs one attempt of a step in this process: environment, logs, time limit, cancel, and a result file by rename.

    request -> claim host.json -> secrets, environment -> logs captured -> steps.<type>.run -> result.json

The process is either a forked child that has nothing else to do meanwhile (`isolated`, see `_spawner`) or a Ray actor
that lives on. The claim makes the attempt run at most once: whoever creates `host.json` runs it, everybody else waits
for the result.

A forked child may run another attempt when this one `left_no_trace`. Environment, directory, import path, fds 0 to 2
and the thread's name are as before then, nobody is left to end or interrupt it, and it has held no secret.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil
from pydantic import ValidationError

from steps import _registry
from steps._artifacts import artifact_hashes
from steps._contract import Outputs, StepCancelled, StepError, StepFailed, StepTimedOut
from steps._environment import step_environment
from steps._files import CANCEL, HOST, OUTPUTS, PROGRESS, RESULT, write_once, write_whole
from steps._kept import Kept
from steps._logs import AttemptLogs, Capture
from steps._masking import mask_file, mask_text, mask_value
from steps._process import (
    TOLD_TO_END,
    become_subreaper,
    descendants,
    end,
    end_children,
    identity,
    is_alive,
    kill_leftovers,
    marked,
)
from steps._request import Outcome, StepRequest, StepResult
from steps._secrets import resolve_secrets

LARGEST_OUTPUTS = 1_000_000
"""Bytes of JSON a step may give as outputs; what is larger belongs in a file whose path is an output."""
_PROGRESS_INTERVAL_S = 0.1
_SHORTEST_GRACE_S = 0.5
"""Time our own code gets to leave, also when the step's grace period is shorter."""


class _ToldToEnd(StepCancelled):
    """Raised inside `run` when this process must end although nobody has cancelled the step."""


class AlreadyStarted(Exception):
    """Another process runs, or has run, this attempt."""


class Host:
    """One attempt in this process; it is also the `Context` that `run` receives. `run()` is called once."""

    def __init__(
        self,
        request: StepRequest,
        folder: Path,
        *,
        gpus: Sequence[str] = (),
        isolated: bool,
        node: str = "",
        kept: Kept | None = None,
    ) -> None:
        """`kept` is what an actor's steps share; without it, what a step keeps ends with the step."""
        self.request = request
        self.attempt_dir = folder
        self.gpus: Sequence[str] = tuple(gpus)
        self.node = node or socket.gethostname()
        self.key = request.key
        self.attempt = request.attempt
        self.grace_s = request.grace_s
        self.gang = request.gang
        self.plan_dir = Path(request.plan_dir)
        self.working_dir = Path(request.working_dir)
        self.env: Mapping[str, str] = {}
        self.declared_env: Mapping[str, str] = {}
        self.secrets: Mapping[str, str] = {}
        self.result: StepResult | None = None
        self.stuck = False
        """True when `run` did not return in time after a cancel: this process is of no further use."""
        self._isolated = isolated
        self._kept = kept
        self._own_objects: dict[str, Any] = {}
        self._pid = os.getpid()
        self._reusable = False
        """True when the step's type leaves no trace in its process."""
        self._childless = False
        self._logs: AttemptLogs | None = None
        self._capture: Capture | None = None
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._ending: type[StepCancelled] | None = None
        self._inside = False
        """True while the step's own code runs: only then is it interrupted."""
        self._interrupt_lock = threading.Lock()
        self._left = threading.Event()
        self._callbacks: list[Callable[[], None]] = []
        self._progress_at = 0.0
        self._started_at = time.time()

    def run(self) -> StepResult:
        """Run the attempt and return how it ended. Raises `AlreadyStarted`; a step's own errors become the result."""
        self._claim()
        if self.attempt > 1:
            kill_leftovers(self.request.step_key, before_attempt=self.attempt)
        become_subreaper()
        self._thread = threading.get_ident()
        try:
            self.secrets = resolve_secrets(self.request.secrets.values(), self.request.workflow_id)
            env = step_environment(self.request, self.secrets, self.attempt_dir, self.gpus)
            # Where GPUs are assigned, a step without one sees none.
            self.env = env if self._isolated or self.gpus else {"CUDA_VISIBLE_DEVICES": "", **env}
            declared = (*self.gang.environment, *self.request.env, *self.request.secrets)
            self.declared_env = {name: self.env[name] for name in declared}
        except StepError as error:
            self._end_with(error)
            return self._publish()
        self._logs = AttemptLogs(self.request, self.attempt_dir, list(self.secrets.values()))
        with marked(self.key), Capture(self._logs, self.request.timeout_s, self._on_alarm) as self._capture:
            if self._ending is not None:
                self._capture.ring()
            self._run_step()
            self._childless = end_children(0 if self._ending is None else self.grace_s, self._spared)
        return self._publish()

    @property
    def left_no_trace(self) -> bool:
        """True when this process may run another attempt; asked when `run` has returned.

        The marker of a cancel is looked for after the result was published, and whoever cancels looks for the result
        after it has left the marker. So either it finds the result and sends no signal, or the marker is found here and
        the process ends: a signal that is meant for this attempt never meets another.
        """
        return (
            self._reusable
            and self.result is not None
            and self.result.exit_code is not None
            and self._ending is None
            and self._childless
            and not self.secrets
            and threading.active_count() == 1
            and not os.path.lexists(self.attempt_dir / CANCEL)
        )

    def cancel(self) -> None:
        """End the attempt: outcome `cancelled`. Returns at once; safe from any thread or signal handler."""
        self._request_end(StepCancelled)

    def on_sigterm(self) -> None:
        """For the handler of SIGTERM: a cancel when whoever sent it has left its marker in the attempt's folder.

        Without one the services or the machine are being stopped, and this attempt with them: it is lost as by SIGKILL,
        and the step is tried again when they are back.
        """
        self._request_end(StepCancelled if os.path.lexists(self.attempt_dir / CANCEL) else _ToldToEnd)

    @property
    def cancelled(self) -> bool:
        """True once the attempt must end."""
        return self._ending is not None

    def check_cancelled(self) -> None:
        """Raise if the attempt must end."""
        if self._ending is not None:
            raise self._ending

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the attempt must end early; at once when it must already."""
        self._callbacks.append(callback)
        if self._ending is not None:
            self._call_back()
            self.check_cancelled()

    def log(self, message: str, stream: str = "stdout") -> None:
        """Write a line to the attempt's log."""
        assert self._logs is not None
        self._logs.write(stream, f"{message}\n".encode(errors="backslashreplace"))

    def heartbeat(self, progress: str | Mapping[str, Any]) -> None:
        """Publish progress to `progress.json`, at most ten times a second."""
        now = time.monotonic()
        if now - self._progress_at < _PROGRESS_INTERVAL_S:
            return
        self._progress_at = now
        value = {"text": progress} if isinstance(progress, str) else dict(progress)
        write_whole(self.attempt_dir / PROGRESS, json.dumps(mask_value(value, self.secrets.values())))

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """What is kept under `name`, made if need be."""
        if self._kept is not None:
            return self._kept.get(name, make)
        if name not in self._own_objects:
            self._own_objects[name] = make()
        return self._own_objects[name]

    def run_process(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        working_dir: Path | None = None,
        stdin: bytes | None = None,
    ) -> int:
        """Run a program to its end; its exit code, 128 + n when signal n killed it."""
        environment = {**self.env, **(env or {})}
        folder = working_dir or self.working_dir
        if not argv[0]:
            raise StepError("the name of the program to run is empty")
        program = argv[0] if "/" in argv[0] else shutil.which(argv[0], path=environment.get("PATH", os.defpath))
        if program is None:
            raise StepError(f"program `{argv[0]}` is not on the step's PATH\n\nhint: PATH is {environment.get('PATH')}")
        self.check_cancelled()
        try:
            process = subprocess.Popen(
                [program, *argv[1:]],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
                process_group=0,
            )
        except OSError as error:
            raise StepError(f"program `{argv[0]}` cannot be started in `{folder}`: {error.strerror}") from error
        except ValueError as error:
            raise StepError(
                f"program `{argv[0]}` cannot be started: {error} in its arguments or environment"
            ) from error
        process.communicate(stdin)
        self.check_cancelled()
        return process.returncode if process.returncode >= 0 else 128 - process.returncode

    def interrupt(self) -> None:
        """Raise in the calling thread if the step's own code runs in it and must end; for signal handlers."""
        if self._inside:
            self.check_cancelled()

    def _claim(self) -> None:
        claim = {
            **identity(),
            "key": self.key,
            "node": self.node,
            "isolated": self._isolated,
            "started_at": self._started_at,
        }
        try:
            is_first = write_once(self.attempt_dir / HOST, json.dumps(claim))
        except FileNotFoundError:
            self.attempt_dir.mkdir(parents=True, exist_ok=True)
            is_first = write_once(self.attempt_dir / HOST, json.dumps(claim))
        if not is_first:
            raise AlreadyStarted(self.key)

    def _run_step(self) -> None:
        """Run the step's code and decide the result. At most one interrupt is ever sent, and none once we have left."""
        try:
            try:
                with self._own_surroundings():
                    self._inside = True
                    self.check_cancelled()
                    step_type = _registry.find(self.request.type)
                    self._reusable = step_type.reusable_process
                    params = _checked(step_type, self.request.params)
                    outputs = self._run_here(lambda: step_type.run(params, self) or {})
            except SystemExit as error:
                if error.code not in (None, 0):
                    raise
                outputs = {}
            finally:
                self._leave()
            # From here on a cancel is too late: the work is done.
            self.check_cancelled()
            outputs = self._all_outputs(outputs)
            self._finish("succeeded", outputs=outputs, artifacts=self._artifacts())
        except BaseException as error:
            self._left.set()
            self._end_with(self._ending() if self._ending is not None else error)

    def _run_here(self, run: Callable[[], Outputs]) -> Outputs:
        """Run the step's code. A child that it forks, and that comes back this way, ends here: it has no result."""
        try:
            return run()
        finally:
            if os.getpid() != self._pid:
                _end_forked_child(sys.exc_info()[1])

    def _artifacts(self) -> dict[str, str]:
        request = self.request
        if not request.artifacts and not request.cached_artifacts:
            return {}
        return artifact_hashes(self.plan_dir, request.artifacts, request.cached_artifacts, lambda: None)

    def _spared(self) -> set[int]:
        """Processes that stay when the step ends."""
        return self._kept.pids() if self._kept is not None else set()

    def _tree(self) -> list[psutil.Process]:
        """The step's own processes."""
        spared = self._spared()
        return [process for process in descendants(os.getpid()) if process.pid not in spared]

    def _leave(self) -> None:
        """Let no interrupt through any more, not even one that is on its way."""
        with self._interrupt_lock:
            self._inside = False
            self._left.set()
        if not self._isolated:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), None)

    def _end_with(self, error: BaseException, said: str = "") -> None:
        """Decide how the attempt has ended; `said` is what to say of an early end instead of the usual."""
        match error:
            case StepTimedOut():
                self._finish("timed_out", "timeout", said or f"not done after {self.request.timeout_s:g} s")
            case _ToldToEnd():
                said = said or "the process that ran the step was told to end"
                self._finish("failed", "infrastructure", said, exit_code=TOLD_TO_END)
            case StepCancelled():
                self._finish("cancelled", "cancelled", said or "cancelled")
            case StepFailed():
                self._finish("failed", _reason(error), str(error), exit_code=error.exit_code)
            case StepError():
                self._finish("failed", "error", str(error), final=True)
            case SystemExit():
                if not isinstance(error.code, int):
                    self.log(str(error.code), "stderr")
                code = error.code & 0xFF if isinstance(error.code, int) else 1
                self._finish("failed", "exit_code", f"the step exited with code {code}", exit_code=code)
            case _:
                self.log("".join(traceback.format_exception(error)).rstrip("\n"), "stderr")
                self._finish("failed", "error", "".join(traceback.format_exception_only(error)).strip())

    @contextlib.contextmanager
    def _own_surroundings(self) -> Iterator[None]:
        """Environment, directory and import path of the step for code that runs in this process."""
        if not self.working_dir.is_dir():
            raise StepError(f"working directory `{self.working_dir}` does not exist on `{self.node}`")
        before = dict(os.environ), os.getcwd(), list(sys.path)  # noqa: PTH109 - on the path of every step
        own = {name: value for name, value in before[0].items() if name.startswith("RAY_") and not self._isolated}
        os.environ.clear()
        os.environ.update({**own, **self.env})
        os.chdir(self.working_dir)
        sys.path[:0] = [str(self.plan_dir)]
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before[0])
            os.chdir(before[1])
            sys.path[:] = before[2]

    def _all_outputs(self, returned: Outputs) -> Outputs:
        outputs = {**_written_outputs(self.attempt_dir / OUTPUTS), **returned}
        try:
            text = json.dumps(outputs, ensure_ascii=False, allow_nan=False)
            size = len(text.encode())
        except (TypeError, ValueError) as error:
            raise StepError(f"outputs of step `{self.request.step_id}` are not JSON: {error}") from error
        if size > LARGEST_OUTPUTS:
            raise _too_large(size)
        missing = [name for name in self.request.expected_outputs if name not in outputs]
        if missing:
            raise StepFailed(f"the step did not write its declared output `{missing[0]}`")
        plain: Outputs = json.loads(text)
        return mask_value(plain, self.secrets.values()) if self.secrets else plain

    def _request_end(self, how: type[StepCancelled]) -> None:
        if self._ending is None and not self._left.is_set():
            self._ending = how
            if self._capture is not None:
                self._capture.ring()

    def _on_alarm(self) -> None:
        """The time is over or somebody cancelled; the thread that copies the logs goes on copying."""
        self._request_end(StepTimedOut)
        threading.Thread(target=self._end_early, name="step-end", daemon=True).start()

    def _end_early(self) -> None:
        """End the tree within the grace period, then our own code, then everything."""
        if self._left.is_set():
            return
        callbacks = threading.Thread(target=self._call_back, name="step-callbacks", daemon=True)
        callbacks.start()
        callbacks.join(max(self.grace_s, _SHORTEST_GRACE_S))
        end(self._tree(), self.grace_s)
        if not self._left.wait(0.05):
            # What the step has started since: a thread that waits for it takes no exception.
            end(self._tree(), self.grace_s)
            self._interrupt()
        if not self._left.wait(max(self.grace_s, _SHORTEST_GRACE_S)):
            self._abandon()

    def _call_back(self) -> None:
        while self._callbacks:
            with contextlib.suppress(Exception, StepCancelled):
                self._callbacks.pop(0)()

    def _interrupt(self) -> None:
        """Raise in the thread that runs the step: by a signal where we own the process, else at its next bytecode."""
        with self._interrupt_lock:
            if not self._inside or self._ending is None:
                return
            if self._isolated:
                signal.pthread_kill(self._thread, signal.SIGUSR1)
            else:
                thread, how = ctypes.c_ulong(self._thread), ctypes.py_object(self._ending)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, how)

    def _abandon(self) -> None:
        assert self._ending is not None
        self.stuck = True
        self._end_with(self._ending(), f"ended by force {self.grace_s:g} s after it was told to stop")
        end_children(0)
        if self._capture is not None:
            self._capture.drain()
        self._publish()
        if self._isolated:
            os._exit(1)

    def _finish(
        self,
        outcome: Outcome,
        reason: str = "",
        error: str = "",
        *,
        final: bool = False,
        exit_code: int | None = None,
        outputs: Outputs | None = None,
        artifacts: dict[str, str] | None = None,
    ) -> None:
        """Decide the result; a later end of the same attempt changes nothing."""
        with self._lock:
            if self.result is not None:
                return
            self.result = StepResult(
                outcome=outcome,
                reason=reason,
                error=mask_text(error, self.secrets.values()),
                final=final,
                exit_code=0 if outcome == "succeeded" else exit_code,
                outputs=outputs or {},
                started_at=self._started_at,
                duration_s=time.time() - self._started_at,
                node=self.node,
                pid=os.getpid(),
                gpus=tuple(self.gpus),
                artifacts=artifacts or {},
                attempt_dir=str(self.attempt_dir),
            )

    def _publish(self) -> StepResult:
        """Close the logs, then write `result.json`: whoever sees a result sees the whole log."""
        assert self.result is not None
        if self._logs is not None:
            self._logs.close()
        if self.secrets:
            mask_file(self.attempt_dir / OUTPUTS, self.secrets.values())
        write_whole(self.attempt_dir / RESULT, self.result.model_dump_json())
        return self.result


def run_isolated(request_file: Path) -> bool:
    """Run an attempt in a process that is all its own meanwhile; True when the process may run another.

    SIGTERM ends it, see `Host.on_sigterm`; SIGINT, a person at the terminal, cancels it. `result.json` is written when
    all logs are.
    """
    request = StepRequest.model_validate_json(request_file.read_bytes())
    host = Host(request, request_file.parent, isolated=True)

    signal.signal(signal.SIGUSR1, lambda number, frame: host.interrupt())
    signal.signal(signal.SIGTERM, lambda number, frame: host.on_sigterm())
    signal.signal(signal.SIGINT, lambda number, frame: host.cancel())
    try:
        host.run()
    except AlreadyStarted:
        return False
    return host.left_no_trace


def warm_up() -> None:
    """Use, without a trace, what every attempt uses: loads it in the spawner, copies its memory in a forked child."""
    params: Mapping[str, dict[str, Any]] = {"command": {"command": "true"}, "python": {"call": "time:time"}}
    for name, fields in params.items():
        _registry.find(name).params.model_validate(fields)
    parts = dict.fromkeys(("workflow_id", "run_id", "step_id", "step_name", "type"), "")
    paths = dict.fromkeys(("plan_dir", "working_dir", "log_dir"), "/")
    request = StepRequest(**parts, **paths, attempt=1, params={}, timeout_s=1)
    host = Host(StepRequest.model_validate_json(request.model_dump_json()), Path("/"), isolated=True)
    json.dumps({**identity(), **step_environment(request, {}, Path("/"), ())})
    shutil.which("true", path=os.defpath)
    host._finish("succeeded")
    assert host.result is not None
    host.result.model_dump_json()
    thread = threading.Thread(target=is_alive, args=(identity(),))
    thread.start()
    thread.join()


def _end_forked_child(error: BaseException | None) -> NoReturn:
    """End a forked copy of a step's process as the interpreter would end a process of its own."""
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif error is not None:
        traceback.print_exception(error)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code & 0xFF)


def _checked(step_type: _registry.StepType, params: dict[str, Any]) -> Any:
    """The step's own fields, checked once more: a template may have rendered to what the plan's check could not see."""
    try:
        return step_type.params.model_validate(params)
    except ValidationError as error:
        problems = [f"`{'.'.join(map(str, each['loc']))}`: {each['msg']}" for each in error.errors(include_input=False)]
        raise StepError(f"params of a `{step_type.name}` step do not fit: {'; '.join(problems)}") from None


def _reason(error: StepFailed) -> str:
    return "error" if error.exit_code is None else "exit_code"


def _too_large(size: int) -> StepError:
    return StepError(
        f"outputs are {size} bytes, at most {LARGEST_OUTPUTS} are allowed\n\n"
        "hint: write a file and give its path as the output"
    )


def _written_outputs(path: Path) -> Outputs:
    """The objects a step wrote to `$STEP_OUTPUTS`, later ones over earlier ones."""
    outputs: Outputs = {}
    try:
        size = path.stat().st_size
        if size > 2 * LARGEST_OUTPUTS:
            raise _too_large(size)
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return outputs
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise StepFailed(f"line {number} of $STEP_OUTPUTS is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise StepFailed(f"line {number} of $STEP_OUTPUTS is not a JSON object")
        outputs.update(value)
    return outputs
