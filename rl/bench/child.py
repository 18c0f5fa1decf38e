"""A process for one measurement: nothing that was measured before is left in it, and it can be ended as a whole.

measure_apart(module, request) -> python -m module REQUEST.json RESULT.json -> answer(...) -> the result
"""

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from rl.types import Frozen

Request = TypeVar("Request", bound=Frozen)
Result = TypeVar("Result", bound=Frozen)

_GRACE_S = 10.0
_LAST_WORDS = 600


class ChildFailed(Exception):
    """There is no result. The argument says why."""


async def measure_apart(
    module: str,
    request: Frozen,
    result: type[Result],
    folder: Path,
    timeout_s: float,
    *,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
) -> Result:
    """What the module's `answer` wrote down. `folder`, which is made, keeps the request, the result and what was said.

    `python` and `environment` are for a child that is to have other packages than this process. Raises `ChildFailed`.
    When this is cancelled, the process and all of its group are ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    asked, answered, said = folder / "request.json", folder / "result.json", folder / "output.log"
    asked.write_text(request.model_dump_json(indent=2))
    answered.unlink(missing_ok=True)
    with said.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            python,
            "-m",
            module,
            str(asked),
            str(answered),
            # Never written to: its end tells the child that nobody waits for it any more.
            stdin=asyncio.subprocess.PIPE,
            stdout=log,
            stderr=asyncio.subprocess.STDOUT,
            env=_own_environment() if environment is None else environment,
            start_new_session=True,
        )
    try:
        async with asyncio.timeout(timeout_s):
            code = await process.wait()
    except TimeoutError:
        raise ChildFailed(f"not done within {timeout_s:g} s; what it said is in `{said}`") from None
    finally:
        await _end(process)
    if code or not answered.exists():
        words = said.read_text(errors="replace").strip().splitlines()
        last = words[-1][-_LAST_WORDS:] if words else "it said nothing"
        raise ChildFailed(f"ended with code {code}: {last}; what it said is in `{said}`")
    return result.model_validate_json(answered.read_text())


def _own_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(each or str(Path.cwd()) for each in sys.path)}


def answer(request: type[Request], work: Callable[[Request], Frozen]) -> None:
    """In the child: do what the first argument asks for, and write the result to the second as a whole."""
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    asked, answered = Path(sys.argv[1]), Path(sys.argv[2])
    found = work(request.model_validate_json(asked.read_text()))
    beside = answered.with_name(f".{answered.name}")
    beside.write_text(found.model_dump_json())
    beside.replace(answered)


def _end_with_parent() -> None:
    """Nobody but the parent ends a child, so one that has lost it ends itself and its group."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


async def _end(process: asyncio.subprocess.Process) -> None:
    """By a signal that lets it end what it started, then all that is left of its group."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_S):
                await process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
