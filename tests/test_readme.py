"""What the README shows, runs: its `bash` blocks in their order, in one shell, in a fresh copy of the project.

Its `sh` blocks want more of the machine: those about containers run here, with the tests' image in place of NVIDIA's.
"""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rl.bench.compare import read_results
from rl.bench.table import summary
from rl.bench.targets import targets
from rl.run_curves import read_curve

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
FOREIGN = ("TEMPORAL_", "RAY_", "ORCHESTRATE_", "VIRTUAL_ENV", "PYTEST_", "MAKE", "MFLAGS")


def blocks(language: str) -> list[str]:
    return [text for found, text in FENCES if found == language]


def test_fences_are_of_a_kind_that_is_tested() -> None:
    assert {language for language, _ in FENCES} == {"", "bash", "sh", "python"}
    # The only fence without a language is the drawing.
    assert len(blocks("")) == 1


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_example_is_listed() -> None:
    shown = {path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".yaml", ".json")}
    assert {name for name in shown - {"plan.schema.json"} if f"examples/{name}" not in README} == set()


def test_the_comparison_is_what_was_measured() -> None:
    """Both tables are made of the committed results, number by number."""
    results = read_results(ROOT / "docs" / "rl-bench" / "results.json")
    section = README.partition("\n### The comparison\n")[2].partition("\n## ")[0]
    (header, *shown), (_, *judged) = tables(section)
    names, rows = summary(results)
    of_cell = {row[0]: dict(zip(names, row, strict=True)) for row in rows}
    assert shown == [[of_cell[row[0]][name] for name in header] for row in shown]
    assert {row[0] for row in shown} >= {name for name in of_cell if not {"task", "hf", "trl"} & set(name.split())}
    assert [row[:2] for row in judged] == [[f"{one.name}: {one.wanted}", one.state] for one in targets(results)]
    missed = ["; ".join(f"{part.label} {part.number}" for part in one.missed) for one in targets(results)]
    assert [row[2] for row in judged] == missed


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a text, each a list of rows, without the rule under its header."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    lines = [[line for line in table.splitlines() if set(line) - set("|-: ")] for table in found]
    return [[[cell.strip() for cell in line.strip("|").split(" | ")] for line in table] for table in lines]


def test_python_blocks_name_what_exists() -> None:
    for text in blocks("python"):
        tree = ast.parse(f"async def shown():\n{textwrap.indent(text, '    ')}")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = __import__(node.module, fromlist=[name.name for name in node.names])
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []


@pytest.mark.temporal
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_commands_run_in_a_fresh_copy(tmp_path: Path) -> None:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    copy = tmp_path / "sygaldry-ray"
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    script = [
        "set -euo pipefail",
        "trap 'orchestrate down >/dev/null || true; kill $(jobs -p) 2>/dev/null || true' EXIT",
    ]
    for number, text in enumerate(blocks("bash")):
        script += [f"echo '== block {number}'", text]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    process = subprocess.Popen(
        ["bash", "-c", "\n".join(script)],
        cwd=copy,
        env={**environment, "ORCHESTRATE_HOME": str(tmp_path / "home"), "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=1400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)
    assert process.returncode == 0, output
    assert (copy / "examples" / "output" / "packages.png").is_file(), output
    assert str(copy / "examples" / "output" / "packages.png") in output
    assert "hello you" in output
    learned = read_curve(copy / "rl-runs" / "simple")
    assert learned.rise >= 0.3, learned
    assert learned.significant, learned


@pytest.mark.docker
@pytest.mark.temporal
@pytest.mark.ray
def test_container_commands_run(base_image: str, ray_image: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "ORCHESTRATE_HOME": str(tmp_path / "home"),
        "SYGALDRY_CONTAINER_ROOT": str(tmp_path / "root"),
        "SYGALDRY_IMAGE": "sygaldry-test/readme:slim",
        "SYGALDRY_BASE": base_image,
        "SYGALDRY_TARGET": "slim",
        "SYGALDRY_SPACK": "none",
        "NO_COLOR": "1",
    }
    text = README.partition("\n## Containers\n")[2].partition("\n## ")[0]
    shown = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    script = "\n".join(["set -euo pipefail", "trap 'orchestrate down >/dev/null' EXIT", *shown])
    ran = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stdout
    for expected in (ray_image, "Ray 2.", "in Debian GNU/Linux", "from a job", "DONE job=hello"):
        assert expected in ran.stdout, ran.stdout
