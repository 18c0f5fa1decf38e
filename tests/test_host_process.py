"""A part's process without a framework: calls at the same time, errors, and an end that nobody outlives."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from rl.config import RunConfig
from rl.host_process import HostProcess
from rl.hosted import HostedTrainer
from rl.stack import PartLost

pytestmark = pytest.mark.timeout(300)


@asynccontextmanager
async def prepared(config: RunConfig) -> AsyncIterator[HostProcess]:
    process = HostProcess("the trainer")
    try:
        await process.prepare(config, "trainer")
        yield process
    finally:
        await process.close()


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not done():
            await asyncio.sleep(0.05)


async def test_a_trainer_is_called_saved_and_ended(emulated: RunConfig, tmp_path: Path) -> None:
    async with prepared(emulated) as process:
        assert await process.begin("open_trainer", emulated, "nowhere", None, "") == 0
        trainer = HostedTrainer(process)
        pid, *others = await asyncio.gather(*(trainer.ping() for _ in range(50)))
        assert set(others) == {pid} and pid != os.getpid() and psutil.Process(pid).ppid() == os.getpid()
        await trainer.save(str(tmp_path))
        assert list(tmp_path.iterdir())
        with pytest.raises(AttributeError, match="no_such_method") as raised:
            await process.call("no_such_method")
        assert "in call" in raised.value.__notes__[0], "where it was raised"
        assert await trainer.ping() == pid, "an error ends nothing"
    assert not psutil.pid_exists(pid)
    with pytest.raises(PartLost, match="the trainer"):
        await trainer.ping()
    await process.close()


async def test_a_process_that_dies_is_told_to_all_who_wait(emulated: RunConfig) -> None:
    async with prepared(emulated) as process:
        await process.begin("open_trainer", emulated, "nowhere", None, "")
        pid = await HostedTrainer(process).ping()
        os.kill(pid, signal.SIGSTOP)
        waiting = [asyncio.ensure_future(process.call("ping")) for _ in range(3)]
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        answers = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 60)
        assert all(isinstance(one, PartLost) and f"(process {pid}) ended with code -9" in str(one) for one in answers)
        with pytest.raises(PartLost, match="ended with code -9"):
            await process.call("ping")


async def test_a_process_ends_when_the_one_that_started_it_is_killed(emulated: RunConfig) -> None:
    script = """
import asyncio, sys
from rl.config import RunConfig
from rl.host_process import HostProcess

async def main():
    config, process = RunConfig.model_validate_json(sys.argv[1]), HostProcess("the trainer")
    await process.prepare(config, "trainer")
    await process.begin("open_trainer", config, "nowhere", None, "")
    print(await process.call("ping"), flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script, emulated.model_dump_json()], stdout=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None
        child = psutil.Process(int(await asyncio.to_thread(parent.stdout.readline)))
    finally:
        parent.kill()
        parent.communicate(timeout=60)
    await until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


async def test_a_process_that_does_not_answer_is_ended_all_the_same(
    emulated: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rl.host_process._CLOSE_TIMEOUT_S", 0.2)
    monkeypatch.setattr("rl.host_process._END_TIMEOUT_S", 0.2)
    async with prepared(emulated) as process:
        await process.begin("open_trainer", emulated, "nowhere", None, "")
        pid = await HostedTrainer(process).ping()
        os.kill(pid, signal.SIGSTOP)
    assert not psutil.pid_exists(pid)


@pytest.fixture
def emulated() -> RunConfig:
    return RunConfig.model_validate({"engine": {"name": "emulated", "emulation": {}}, "learner": {"emulation": {}}})
