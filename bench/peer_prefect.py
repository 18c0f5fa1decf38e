"""Prefect with the server it starts for itself (loopback, SQLite)."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

# Read when prefect is imported.
os.environ.update(
    PREFECT_HOME=tempfile.mkdtemp(prefix="bench-prefect-"),
    PREFECT_LOGGING_LEVEL="CRITICAL",
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE="true",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    DO_NOT_TRACK="1",
)

from prefect import flow, task
from prefect.cache_policies import INPUTS
from prefect.futures import wait
from runner import Measure, serve


@task
def nothing() -> None:
    """Return at once."""


@task(cache_policy=INPUTS, persist_result=True)
def remembered(number: int) -> int:
    """A value that is looked up the second time."""
    return number


@flow
def chain(count: int) -> None:
    for _ in range(count):
        nothing()


@flow
def fan(count: int) -> None:
    wait([nothing.submit() for _ in range(count)])


@flow
def cached(count: int) -> None:
    wait([remembered.submit(number) for number in range(count)])


FLOWS = {"one": chain, "chain": chain, "fan": fan, "cached": cached}


def measure(shape: str, count: int) -> float:
    if shape == "cached":
        cached(count)
    started = time.perf_counter()
    FLOWS[shape](count)
    return time.perf_counter() - started


@contextmanager
def opened(folder: Path) -> Iterator[Measure]:
    yield measure


if __name__ == "__main__":
    import shutil

    try:
        serve(version("prefect"), opened)
    finally:
        shutil.rmtree(os.environ["PREFECT_HOME"], ignore_errors=True)
