"""The end of a process is noticed, be it before or after one looks."""

import asyncio
import subprocess
import sys

from rl.process_end import process_end


async def test_a_process_that_is_killed_is_noticed_and_one_that_lives_is_not() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with process_end(process.pid) as end, process_end(process.pid) as too:
            assert not end.done()
            process.kill()
            await asyncio.wait_for(asyncio.gather(end, too), 60)
        process.wait(60)
        with process_end(process.pid) as end:
            assert end.done()
    finally:
        process.kill()
        process.communicate(timeout=60)
