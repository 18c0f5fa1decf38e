"""Every example runs as its first comment says, on the real services, in a copy of the folder."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PLANS = sorted(path.name for path in (ROOT / "examples").glob("*.yaml"))
TOKEN = "examples-token-2f6fde"

pytestmark = [pytest.mark.temporal, pytest.mark.timeout(900)]

Orchestrate = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the examples, so that results do not land in the project."""
    copy = tmp_path_factory.mktemp("examples") / "examples"
    shutil.copytree(ROOT / "examples", copy, ignore=shutil.ignore_patterns("output", "__pycache__"))
    return copy


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose services are this module's own."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("TEMPORAL_", "RAY_", "ORCHESTRATE_"))
    }
    home = str(tmp_path_factory.mktemp("home"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}"
    return {**kept, "PATH": path, "ORCHESTRATE_HOME": home, "SYGALDRY_EXAMPLE_TOKEN": TOKEN, "NO_COLOR": "1"}


@pytest.fixture(scope="module")
def orchestrate(folder: Path, environment: dict[str, str]) -> Iterator[Orchestrate]:
    """Runs the command beside the examples; the services it started are stopped at the end."""

    def run(*arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["orchestrate", *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    yield run
    down = run("down", timeout_s=60)
    assert down.returncode == 0, down.stderr


def report_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The run report of a command with `--json`, its steps by id."""
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    report["steps"] = {step["id"]: step for step in report["steps"]}
    return report


def outcomes(report: dict[str, Any]) -> dict[str, str]:
    return {step["id"]: step["outcome"] for step in report["steps"].values()}


def succeeded(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    report = report_of(done)
    assert done.returncode == 0 and report["outcome"] == "succeeded", (done.stderr, report)
    return report


@pytest.mark.parametrize("plan", PLANS)
def test_every_example_is_valid_and_names_its_schema(orchestrate: Orchestrate, folder: Path, plan: str) -> None:
    done = orchestrate("validate", plan)
    assert done.returncode == 0, done.stderr + done.stdout
    modeline = re.match(r"# yaml-language-server: \$schema=(\S+)", (folder / plan).read_text())
    assert modeline and (folder / modeline.group(1)).is_file()


def test_the_schema_beside_the_examples_is_the_current_one(orchestrate: Orchestrate, folder: Path) -> None:
    done = orchestrate("schema")
    assert json.loads(done.stdout) == json.loads((folder / "plan.schema.json").read_text()), (
        "the plan's schema has changed; run: orchestrate schema > examples/plan.schema.json"
    )


def test_every_example_has_a_test() -> None:
    text = Path(__file__).read_text()
    shown = [path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".yaml", ".py", ".json")]
    helpers = {"demo_steps.py", "demo_chart.py", "dice.py", "plan.schema.json"}
    assert [name for name in shown if f'"{name}"' not in text and name not in helpers] == []


def test_hello(orchestrate: Orchestrate) -> None:
    report = succeeded(orchestrate("hello.yaml", "--json"))
    assert report["steps"]["hello"]["stdout_tail"] == "hello world\n"


@pytest.mark.ray
def test_demo_counts_the_packages_and_draws_a_picture(orchestrate: Orchestrate, folder: Path) -> None:
    from PIL import Image

    root = folder.parent / "packages"
    for name in ("click", "jinja2", "rich"):
        module = __import__(name)
        shutil.copytree(Path(str(module.__file__)).parent, root / name)
    report = succeeded(orchestrate("demo.yaml", "--json", "-p", f"root={root}", "-p", "shards=3"))
    assert set(report["steps"]) >= {"list", "count.0", "count.1", "count.2", "merge", "chart"}
    picture = Path(report["steps"]["chart"]["outputs"]["picture"])
    assert picture == folder / "output" / "packages.png"
    with Image.open(picture) as image:
        assert image.width == 1200
    table = (folder / "output" / "packages.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in table] == ["package", "rich", "jinja2", "click"]


@pytest.mark.parametrize(
    ("exit_code", "expected"),
    [
        ("0", {"check": "succeeded", "publish": "succeeded", "report_failure": "skipped", "clean_up": "succeeded"}),
        ("3", {"check": "failed", "publish": "skipped", "report_failure": "succeeded", "clean_up": "succeeded"}),
    ],
)
def test_pipeline_runs_the_handler_that_fits(
    orchestrate: Orchestrate, exit_code: str, expected: dict[str, str]
) -> None:
    report = succeeded(orchestrate("pipeline.yaml", "--json", "-p", f"exit_code={exit_code}"))
    assert {**outcomes(report), **expected} == outcomes(report)
    if exit_code == "3":
        assert [attempt["exit_code"] for attempt in report["steps"]["check"]["attempts"]] == [3, 3]


def test_matrix_gives_lists_in_its_order(orchestrate: Orchestrate) -> None:
    report = succeeded(orchestrate("matrix.yaml", "--json"))
    sides = [report["steps"][f"sample.{number}"]["outputs"]["sides"] for number in range(6)]
    assert sides == [6, 20] * 3
    assert len(report["steps"]["compare"]["outputs"]["bias"]) == 6


def test_cache_gives_the_old_outputs_until_something_changes(orchestrate: Orchestrate, folder: Path) -> None:
    first = succeeded(orchestrate("cache.yaml", "--json"))
    again = succeeded(orchestrate("cache.yaml", "--json"))
    changed = succeeded(orchestrate("cache.yaml", "--json", "-p", "times=5000"))
    assert [step["reason"] for step in first["steps"].values()] == ["", ""]
    assert [step["reason"] for step in again["steps"].values()] == ["cached", "cached"]
    assert again["steps"]["roll"]["outputs"] == first["steps"]["roll"]["outputs"]
    assert [step["reason"] for step in changed["steps"].values()] == ["", ""]
    mean = (folder / "output" / "cache" / "mean.txt").read_text()
    assert float(mean) == changed["steps"]["roll"]["outputs"]["mean"]


def test_secret_is_used_and_masked(orchestrate: Orchestrate) -> None:
    done = orchestrate("secrets.yaml", "--json")
    report = succeeded(done)
    assert f"the token has {len(TOKEN)} characters" in report["steps"]["use"]["stdout_tail"]
    assert TOKEN not in done.stdout + done.stderr


def test_old_step_lists_run(orchestrate: Orchestrate) -> None:
    done = orchestrate("run", "-input", "legacy_steps.json", "--json")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert [step["outcome"] for step in report["steps"]] == ["succeeded", "succeeded", "failed"]
    assert report["steps"][1]["stdout_tail"] == "hello world\n"


def test_plan_from_python(orchestrate: Orchestrate, folder: Path, environment: dict[str, str]) -> None:
    done = python(folder, environment, "library.py")
    assert "library: succeeded" in done.stdout, done.stderr


@pytest.mark.ray
def test_own_workflow_calls_ray(orchestrate: Orchestrate, folder: Path, environment: dict[str, str]) -> None:
    done = python(folder, environment, "bridge_library.py")
    assert re.search(r"bias of the dice: \[(-?0\.\d+, ){2}-?0\.\d+\]", done.stdout), done.stderr


@pytest.mark.ray
def test_language_model_answers(orchestrate: Orchestrate, folder: Path) -> None:
    report = succeeded(orchestrate("smollm2.yaml", "--json", timeout_s=840))
    answers = [json.loads(line) for line in (folder / "output/smollm2/answers.jsonl").read_text().splitlines()]
    assert "Paris" in answers[0]["answer"]
    assert report["steps"]["answer"]["outputs"]["tokens_per_s"] > 0
    assert report["steps"]["check"]["outputs"]["answers"] == str(folder / "output/smollm2/answers.jsonl")
    shutil.rmtree(folder / "output/smollm2")


def test_a_model_learns_and_goes_on_learning(orchestrate: Orchestrate, folder: Path) -> None:
    for updates in (2, 4):
        done = orchestrate("rl_train.yaml", "-p", f"updates={updates}", "--json", timeout_s=600)
        outputs = succeeded(done)["steps"]["train"]["outputs"]
        assert outputs["updates"] == updates
        assert outputs["accuracy_interval"]["low"] <= outputs["accuracy"] <= outputs["accuracy_interval"]["high"]
        assert Path(outputs["model"], "model.safetensors").is_file()
    lines = (folder / "output/rl_train/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["train"]["update"] for line in lines] == [0, 1, 2, 3]


@pytest.mark.timeout(900)
def test_stacks_are_measured_and_the_page_is_published(orchestrate: Orchestrate, folder: Path) -> None:
    small = ["-p", "updates=1", "-p", 'stacks=["local"]', "-p", 'parts=["matrix"]']
    report = succeeded(orchestrate("rl_bench.yaml", *small, "--json", timeout_s=800))
    published = folder / "output/rl_bench/published"
    assert Path(report["steps"]["bench"]["outputs"]["results"]).is_file()
    results = json.loads((published / "results.json").read_text())
    assert [(run["key"]["mode"], run["error"], run["accounting"] is not None) for run in results["runs"]] == [
        ("sync", "", True),
        ("async", "", True),
    ]
    assert "<html" in (published / "report.html").read_text()


def python(folder: Path, environment: dict[str, str], script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, script],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
