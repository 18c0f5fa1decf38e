"""The benchmark runs and keeps what it measured: with the Temporal floor alone, in small shapes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.temporal
def test_bench_measures_the_floor_and_keeps_numbers_with_versions(tmp_path: Path) -> None:
    command = [sys.executable, "bench/run.py", "--quick", "--only", "floor: activity runs", "--output", str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    assert "chain of 5" in output
    (path,) = tmp_path.glob("*.json")
    document = json.loads(path.read_text())
    assert document["machine"]["temporalio"] and document["loads"]
    measured = {(found["kind"], found["shape"]): found["samples"] for found in document["results"]}
    assert set(measured) == {("inside", "one"), ("inside", "chain"), ("inside", "fan"), ("cold", "one")}
    assert all(sample > 0 for samples in measured.values() for sample in samples)
    assert document["memory_mb"]["floor: activity runs `true`"]["worker"] > 10


def test_an_unknown_system_is_named_with_the_known_ones(tmp_path: Path) -> None:
    command = [sys.executable, "bench/run.py", "--only", "airflow", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no system starts with `airflow`" in done.stderr
    assert "dagster" in done.stderr
