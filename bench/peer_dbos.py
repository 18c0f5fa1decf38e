"""DBOS with its SQLite system database: async steps in one process."""

import asyncio
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from dbos import DBOS, DBOSConfig, SetWorkflowID
from runner import Measure, serve


@DBOS.step()
async def nothing() -> None:
    """Return at once."""


@DBOS.workflow()
async def shape_workflow(shape: str, count: int) -> None:
    if shape == "chain":
        for _ in range(count):
            await nothing()
    else:
        await asyncio.gather(*(nothing() for _ in range(count)))


async def run(shape: str, count: int) -> float:
    started = time.perf_counter()
    with SetWorkflowID(str(uuid.uuid4())):
        await shape_workflow(shape, count)
    return time.perf_counter() - started


@contextmanager
def opened(folder: Path) -> Iterator[Measure]:
    config: DBOSConfig = {
        "name": "bench",
        "system_database_url": f"sqlite:///{folder / 'dbos.sqlite'}",
        "run_admin_server": False,
        "log_level": "ERROR",
    }
    DBOS(config=config)
    DBOS.launch()
    loop = asyncio.new_event_loop()
    try:
        yield lambda shape, count: None if shape == "cached" else loop.run_until_complete(run(shape, count))
    finally:
        DBOS.destroy()
        loop.close()


if __name__ == "__main__":
    serve(version("dbos"), opened)
