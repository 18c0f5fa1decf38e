"""A stuck phase is named, with the stacks of the processes concerned; other processes are left alone."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rl.virtual_clock import run_virtually
from rl.watchdog import FOLDER_VARIABLE, Stuck, Watchdog, other_stacks, register

HANGS = """
import sys, threading
from rl.watchdog import register

def hang_here() -> None:
    threading.Event().wait(600)

register("generator 1")
print("ready", flush=True)
hang_here()
"""


@contextmanager
def hanging(folder: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, FOLDER_VARIABLE: str(folder)}
    process = subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_phase_that_takes_too_long_is_named_once() -> None:
    told: list[Stuck] = []

    async def run() -> None:
        dog = Watchdog(10, told.append)
        with dog.phase("wait for groups", "generator 0"):
            await asyncio.sleep(9)
        with dog.phase("update", "trainer"):
            await asyncio.create_task(asyncio.sleep(100), name="the one that sleeps")
        await dog.close()

    run_virtually(run())
    (stuck,) = told
    assert str(stuck) == "phase `update` (waiting for trainer) is not done after 10 s"
    assert stuck.parts == ("trainer",)
    assert "await asyncio.create_task" in stuck.stacks and f"threads of process {os.getpid()}" in stuck.stacks


def test_a_phase_that_fails_is_not_stuck() -> None:
    told: list[Stuck] = []

    async def run() -> None:
        dog = Watchdog(1, told.append)
        try:
            with dog.phase("load"):
                raise OSError
        except OSError:
            await asyncio.sleep(50)
        await dog.close()

    run_virtually(run())
    assert told == []


async def test_the_stacks_of_another_process_come_while_it_hangs(tmp_path: Path) -> None:
    with hanging(tmp_path) as process:
        for _ in range(10):
            stacks = await other_stacks(tmp_path, ("generator 1",))
            if "hang_here" in stacks:
                break
        assert f"threads of `generator 1`, process {process.pid}" in stacks and "hang_here" in stacks
        assert await other_stacks(tmp_path, ("trainer",)) == ""
        assert process.poll() is None


async def test_a_stuck_phase_comes_with_the_stacks_of_its_part(tmp_path: Path) -> None:
    told: list[Stuck] = []
    with hanging(tmp_path):
        seen = asyncio.Event()

        def tell(stuck: Stuck) -> None:
            told.append(stuck)
            seen.set()

        dog = Watchdog(0.01, tell, tmp_path)
        with dog.phase("generate", "generator 1"):
            async with asyncio.timeout(120):
                await seen.wait()
        await dog.close()
    assert "threads of `generator 1`, process" in told[0].stacks


async def test_a_process_that_did_not_register_gets_no_signal(tmp_path: Path) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with hanging(tmp_path) as process:
            (registered,) = tmp_path.glob("*.process")
            lines = registered.read_text().splitlines()
            assert lines[2] == str(process.pid)
            registered.write_text("\n".join([*lines[:2], str(sleeper.pid), "1.0"]))
            assert "not asked: it is gone" in await other_stacks(tmp_path, ("generator 1",))
        registered.write_text("\n".join(lines))
        assert "not asked: it is gone" in await other_stacks(tmp_path, ("generator 1",))
        registered.write_text("\n".join([lines[0], "elsewhere", *lines[2:]]))
        assert "not asked: it is on another machine" in await other_stacks(tmp_path, ("generator 1",))
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        assert sleeper.wait() == -signal.SIGKILL


def test_without_a_run_nothing_is_registered() -> None:
    assert FOLDER_VARIABLE not in os.environ
    register("trainer")
