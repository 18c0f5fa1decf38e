"""All processes of one learner: the first is this one, the others are its own children.

    method(arguments) -> every process does it at the same time -> the first one's result

A child lives on one end of a socket pair and ends when the other end is gone, so it outlives nobody. No child is
forked from a process that hosts an engine: each is a Python of its own.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.config import RunConfig
from rl.pinning import pin
from rl.stack import PartLost
from rl.types import Frozen

if TYPE_CHECKING:
    from rl.learner import Learner
    from rl.learner_emulated import EmulatedLearner

_START_TIMEOUT_S = 300.0
_ANSWER_TIMEOUT_S = 1800.0
_REASON_TIMEOUT_S = 5.0
_END_TIMEOUT_S = 10.0


class LearnerStart(Frozen):
    """What a process needs to become part of a learner."""

    config: RunConfig
    model_folder: str
    folder: str
    rank: int
    meeting_file: str


class LearnerProcesses:
    """Used from one thread."""

    def __init__(self, config: RunConfig, model_folder: str, folder: str = "") -> None:
        """Start them and load the model, or what was saved to `folder`. Raises `PartLost`."""
        self._meeting = tempfile.TemporaryDirectory(prefix="orchestrate-learner-")
        self._children: list[_Child] = []
        try:
            start = LearnerStart(
                config=config,
                model_folder=model_folder,
                folder=folder,
                rank=0,
                meeting_file=str(Path(self._meeting.name, "meeting")),
            )
            for rank in range(1, config.learner.num_processes):
                self._children.append(_Child(start.model_copy(update={"rank": rank})))
            for child in self._children:
                child.answer(_START_TIMEOUT_S)
            self._learner, self._collective = open_learner(start)
        except BaseException:
            self.close()
            raise

    @property
    def first(self) -> "Learner | EmulatedLearner":
        """The learner in this process."""
        return self._learner

    def together(self, method: str, *arguments: Any) -> Any:
        """What `Learner.<method>` returns in this process, done in all. Raises `PartLost`."""
        for child in self._children:
            child.ask(method, arguments)
        try:
            result = getattr(self._learner, method)(*arguments)
        except RuntimeError as error:
            # A process that goes away breaks what the others add up.
            reasons = [reason for child in self._children if (reason := child.reason())]
            if not reasons:
                raise
            raise PartLost("; ".join(reasons)) from error
        for child in self._children:
            child.answer(_ANSWER_TIMEOUT_S)
        return result

    def close(self) -> None:
        """End the children."""
        for child in self._children:
            child.close()
        self._children = []
        if hasattr(self, "_collective"):
            self._collective.close()
        self._meeting.cleanup()


class _Child:
    def __init__(self, start: LearnerStart) -> None:
        self._name = f"learner process {start.rank}"
        self._connection, theirs = Pipe()
        threads = str(start.config.learner.num_threads)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(each or str(Path.cwd()) for each in sys.path),
            "OMP_NUM_THREADS": threads,
            # Threads that wait by spinning take the cores of the others.
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rl.learner_processes", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        self._send(start)

    def ask(self, method: str, arguments: Sequence[Any]) -> None:
        self._send((method, arguments))

    def answer(self, timeout_s: float) -> None:
        """Wait until it has done what it was asked. Raises `PartLost`."""
        try:
            if not self._connection.poll(timeout_s):
                raise PartLost(f"{self._name} has not answered within {timeout_s:g} s")
            error = self._connection.recv()
        except (EOFError, OSError) as closed:
            raise PartLost(self._ended()) from closed
        if error:
            raise PartLost(f"{self._name}: {error}")

    def reason(self) -> str:
        """Why it is lost, empty where it is not."""
        if not self._connection.poll(_REASON_TIMEOUT_S):
            return ""
        try:
            self.answer(0)
        except PartLost as lost:
            return str(lost)
        return ""

    def close(self) -> None:
        """It ends by itself when nobody talks to it, and is killed when it does not."""
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_TIMEOUT_S)
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(_END_TIMEOUT_S)

    def _send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except OSError as closed:
            raise PartLost(self._ended()) from closed

    def _ended(self) -> str:
        try:
            code = self._process.wait(_REASON_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"{self._name} does not answer"
        return f"{self._name} (pid {self._process.pid}) ended with code {code}"


def open_learner(start: LearnerStart) -> "tuple[Learner | EmulatedLearner, Any]":
    """This process's part, and its end of what the parts add up; all processes call it at the same time."""
    import torch

    from rl.collective import Collective

    pin(start.config.learner.cores)
    torch.set_num_threads(start.config.learner.num_threads)
    size, gpus = start.config.learner.num_processes, start.config.trainer_gpus > 0
    collective = Collective(start.rank, size, start.meeting_file, gpus=gpus)
    try:
        if (emulation := start.config.learner.emulation) is not None:
            from rl.learner_emulated import EmulatedLearner

            return EmulatedLearner(emulation, start.folder, collective), collective
        from rl.learner import Learner

        return Learner(start.config, start.model_folder, start.folder, collective), collective
    except BaseException:
        collective.close()
        raise


def main() -> None:
    """A child: part of a learner for as long as somebody asks."""
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    try:
        start: LearnerStart = connection.recv()
        import rl.learner  # noqa: F401 - what takes long, before the others are met

        connection.send(None)
        learner, _ = open_learner(start)
        while True:
            method, arguments = connection.recv()
            getattr(learner, method)(*arguments)
            connection.send(None)
    except (EOFError, ConnectionError):
        return
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send(f"{type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    main()
