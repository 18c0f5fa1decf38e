"""What `--help`, `validate`, `graph` and `schema` need must not import the heavy parts."""

import subprocess
import sys

HEAVY = ("ray", "torch", "vllm", "monarch", "docker", "temporalio", "huggingface_hub", "numpy", "matplotlib")
LIGHT = (
    "bridge.plan",
    "bridge.problems",
    "bridge.reader",
    "bridge.legacy",
    "bridge.checks",
    "bridge.expressions",
    "bridge.sandbox",
    "bridge.graph",
    "bridge.plan_schema",
    "bridge.cli.plan",
    "bridge.cli.job",
    "bridge.cli.spack",
    "bridge.cli.rl",
    "bridge.autobuild",
    "rl",
    "rl.types",
    "rl.prompts",
    "rl.scripted",
    "rl.rollout",
    "rl.bench.report",
    "rl.bench.compare",
    "rl.evaluation",
    "rl.evaluation_plot",
    "rl.config",
    "rl.train",
    "rl.run_folder",
    "rl.stacks.scripted",
    "rl.loss_settings",
    "rl.config",
    "rl.stack",
    "rl.models",
    "rl.tiny",
    "rl.engine",
    "rl.engine_environment",
    "rl.generator",
    "rl.turn_barrier",
)


def _run(code: str) -> None:
    prelude = f"import sys\nfor name in {HEAVY!r}: sys.modules[name] = None\n"
    done = subprocess.run([sys.executable, "-W", "error", "-c", prelude + code], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()


def test_the_front_end_imports_without_the_heavy_parts() -> None:
    _run(f"import importlib\nfor name in {LIGHT!r}: importlib.import_module(name)\n")


def test_every_step_type_and_its_schema_load_without_the_heavy_parts() -> None:
    _run(
        "from steps._registry import step_types\n"
        "for name, found in step_types().items():\n"
        "    assert found.params.model_json_schema()['properties'], name\n"
        "    assert found.summary, name\n"
        "    found.outputs\n"
        "from bridge.plan_schema import plan_schema\n"
        "assert len(plan_schema()['$defs']) > len(step_types())\n"
    )
