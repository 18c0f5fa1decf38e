"""Snakemake: one process per plan and one per job (`touch`), two at a time. Its state is the files."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from runner import Measure, serve

SNAKEFILE = """
rule all:
    input: {targets}

rule step:
    input: lambda wildcards: {before}
    output: "step_{{number}}"
    shell: "touch {{output}}"
"""


def run(folder: Path, shape: str, count: int) -> float:
    chain = shape == "chain"
    targets = repr([f"step_{count - 1}"] if chain else [f"step_{number}" for number in range(count)])
    before = '[f"step_{int(wildcards.number) - 1}"] if int(wildcards.number) else []' if chain else "[]"
    (folder / "Snakefile").write_text(SNAKEFILE.format(targets=targets, before=before))
    started = time.perf_counter()
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--quiet", "all", "--nolock"]
    subprocess.run(command, cwd=folder, check=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - started


@contextmanager
def opened(folder: Path) -> Iterator[Measure]:
    def measure(shape: str, count: int) -> float:
        project = folder / "project"
        shutil.rmtree(project, ignore_errors=True)
        project.mkdir()
        duration_s = run(project, shape, count)
        return run(project, shape, count) if shape == "cached" else duration_s

    yield measure


if __name__ == "__main__":
    serve(version("snakemake"), opened)
