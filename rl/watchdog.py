"""Who is stuck, and where: a phase that takes too long is named, with the stacks of the processes concerned.

    loop: with watchdog.phase("update", "trainer") --too long--> report(Stuck) <-- stacks of this and of the trainer
    every process that hosts a part: register("trainer")

A timer per phase, no polling. The stacks of another process on this machine come by a signal that Python's C code
answers, so they come even when its event loop or the interpreter hangs. The watchdog observes: it ends nothing, and
a process that cannot be asked is only said to be so.
"""

import asyncio
import faulthandler
import io
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from rl.types import Frozen

FOLDER_VARIABLE = "ORCHESTRATE_RL_STACKS"
"""Environment variable: the folder where the processes of a run register."""
_SIGNAL = signal.SIGUSR2
_ANSWER_S, _QUIET_S = 10.0, 0.25
"""How long to wait for the stacks of another process, and how long it says nothing more when they are whole."""


class Stuck(Frozen):
    """A phase that takes longer than it should."""

    phase: str
    parts: tuple[str, ...]
    """`trainer`, `generator 0`."""
    after_s: float
    stacks: str
    """Tasks and threads of the loop's process, then of the processes of the parts."""

    def __str__(self) -> str:
        concerned = f" (waiting for {', '.join(self.parts)})" if self.parts else ""
        return f"phase `{self.phase}`{concerned} is not done after {self.after_s:g} s"


class Watchdog:
    """Watches the phases of one event loop."""

    def __init__(self, stuck_after_s: float, report: Callable[[Stuck], None], folder: Path | None = None) -> None:
        self._stuck_after_s = stuck_after_s
        self._report = report
        self._folder = folder
        self._looking: set[asyncio.Task[None]] = set()

    @contextmanager
    def phase(self, name: str, *parts: str) -> Iterator[None]:
        """Time what is inside; `parts` are those it waits for. It is reported once, and goes on."""
        timer = asyncio.get_running_loop().call_later(self._stuck_after_s, self._look, name, parts)
        try:
            yield
        finally:
            timer.cancel()

    async def close(self) -> None:
        """Reports that are being made are finished."""
        await asyncio.gather(*self._looking)

    def _look(self, name: str, parts: tuple[str, ...]) -> None:
        task = asyncio.create_task(self._tell(name, parts, own_stacks()))
        self._looking.add(task)
        task.add_done_callback(self._looking.discard)

    async def _tell(self, name: str, parts: tuple[str, ...], stacks: str) -> None:
        if self._folder is not None:
            stacks += await other_stacks(self._folder, parts)
        self._report(Stuck(phase=name, parts=parts, after_s=self._stuck_after_s, stacks=stacks))


def register(part: str) -> None:
    """Let the watchdog of the run ask this process, which hosts `part`, for its stacks.

    Does nothing in a process that no run started (`FOLDER_VARIABLE` is not set).
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return
    name = f"{part.replace(' ', '-')}@{socket.gethostname()}-{os.getpid()}"
    Path(folder).mkdir(parents=True, exist_ok=True)
    # faulthandler keeps the descriptor, not the file, so the file must live as long as the process.
    answers = Path(folder, f"{name}.stacks").open("w")  # noqa: SIM115
    _ANSWERS.append(answers)
    faulthandler.register(_SIGNAL, file=answers, all_threads=True)
    lines = [part, socket.gethostname(), str(os.getpid()), str(psutil.Process().create_time())]
    beside = Path(folder, f".{name}")
    beside.write_text("\n".join(lines))
    beside.replace(Path(folder, f"{name}.process"))


_ANSWERS: list[io.TextIOWrapper] = []


def own_stacks() -> str:
    """The tasks of the running event loop, and the threads of this process."""
    text = io.StringIO()
    for task in sorted(asyncio.all_tasks(), key=lambda task: task.get_name()):
        task.print_stack(file=text)
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return f"tasks of process {os.getpid()}\n{text.getvalue()}threads of process {os.getpid()}\n{file.read()}"


async def other_stacks(folder: Path, parts: tuple[str, ...]) -> str:
    """The threads of the registered processes that host `parts`."""
    found: list[str] = []
    for registered in sorted(folder.glob("*.process")):
        part, host, pid, started = registered.read_text().splitlines()
        if part in parts and int(pid) != os.getpid():
            title = f"threads of `{part}`, process {pid} on {host}"
            found.append(f"{title}\n{await _ask(registered, host, int(pid), float(started))}")
    return "".join(found)


async def _ask(registered: Path, host: str, pid: int, started: float) -> str:
    if host != socket.gethostname():
        return "not asked: it is on another machine\n"
    try:
        # The number may be another process's by now, which the signal would end.
        process = psutil.Process(pid)
        if process.create_time() != started:
            return "not asked: it is gone\n"
        answer = registered.with_name(registered.name.removesuffix(".process") + ".stacks")
        before = answer.stat().st_size
        process.send_signal(_SIGNAL)
    except psutil.NoSuchProcess:
        return "not asked: it is gone\n"
    return await asyncio.to_thread(_read_answer, answer, before)


def _read_answer(answer: Path, before: int) -> str:
    """What is written behind `before`, once there is no more to come."""
    end = time.monotonic() + _ANSWER_S
    size = before
    while time.monotonic() < end:
        time.sleep(_QUIET_S)
        grown = answer.stat().st_size
        if grown > before and grown == size:
            break
        size = grown
    with answer.open() as file:
        file.seek(before)
        return file.read() or f"no answer within {_ANSWER_S:g} s\n"
