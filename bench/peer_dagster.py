"""Dagster in process, with its run log on disk (SQLite). Jobs are built before the clock starts."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from dagster import DagsterInstance, In, JobDefinition, Nothing, job, op
from runner import Measure, serve

QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


@op(ins={"after": In(Nothing)})
def following() -> None:
    """Return at once, after another."""


@op
def nothing() -> None:
    """Return at once."""


def job_of(shape: str, count: int) -> JobDefinition:
    @job(name=f"{shape}_{count}")
    def built() -> None:
        if shape == "chain":
            last = nothing.alias("step_0")()
            for number in range(1, count):
                last = following.alias(f"step_{number}")(last)
        else:
            for number in range(count):
                nothing.alias(f"step_{number}")()

    return built


@contextmanager
def opened(folder: Path) -> Iterator[Measure]:
    with DagsterInstance.local_temp(str(folder)) as instance:

        def measure(shape: str, count: int) -> float | None:
            if shape == "cached":
                return None
            built = job_of(shape, count)
            started = time.perf_counter()
            if not built.execute_in_process(instance=instance, run_config=QUIET).success:
                raise RuntimeError(f"{shape} {count} failed")
            return time.perf_counter() - started

        yield measure


if __name__ == "__main__":
    serve(version("dagster"), opened)
