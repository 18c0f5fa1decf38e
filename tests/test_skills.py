"""Every command that a skill shows runs; Codex is an executable that records its arguments."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from bridge import services
from bridge.state import State

SKILLS = Path(__file__).parent.parent / "skills"
NAMES = sorted(path.parent.name for path in SKILLS.glob("*/SKILL.md"))
PROGRAMS = str(Path(sys.executable).parent)
PATIENCE_S = 120.0

CODEX = """#!{python}
import json, os, sys, time
if "--help" in sys.argv:
    print(os.environ.get("CODEX_HELP", ""))
    sys.exit()
with open(os.environ["CODEX_RECORD"], "a") as record:
    print(json.dumps({{"argv": sys.argv[1:], "stdin": sys.stdin.read(), "pid": os.getpid()}}), file=record)
print(json.dumps({{"type": "thread.started"}}), flush=True)
time.sleep(float(os.environ.get("CODEX_SLEEP", "0")))
if "--output-last-message" in sys.argv:
    with open(sys.argv[sys.argv.index("--output-last-message") + 1], "w") as output:
        print("all is well", file=output)
print(json.dumps({{"type": "turn.completed"}}), flush=True)
sys.exit(int(os.environ.get("CODEX_EXIT", "0")))
"""


class Codex:
    """The skill in a folder of its own, with a Codex that records."""

    def __init__(self, folder: Path) -> None:
        self.skill, self.record, programs = folder / "skill", folder / "record", folder / "programs"
        shutil.copytree(SKILLS / "codex-headless", self.skill, ignore=shutil.ignore_patterns("logs"))
        programs.mkdir()
        (programs / "codex").write_text(CODEX.format(python=sys.executable))
        (programs / "codex").chmod(0o755)
        self.env = {**os.environ, "PATH": f"{programs}:/usr/bin:/bin", "CODEX_RECORD": str(self.record)}
        self.env.pop("CODEX_LOG_DIR", None)

    def command(self, *words: str, **env: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["scripts/codex_exec.sh", *words],
            cwd=self.skill,
            env={**self.env, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words: str, code: int = 0, **env: str) -> tuple[str, str]:
        """Output and errors of the script."""
        process = self.command(*words, **env)
        output, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == code, (output, errors)
        return output, errors

    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.record.read_text().splitlines()] if self.record.exists() else []


@pytest.fixture
def codex(tmp_path: Path) -> Codex:
    return Codex(tmp_path)


def text_of(name: str) -> str:
    return (SKILLS / name / "SKILL.md").read_text(encoding="utf-8")


def blocks(name: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", text_of(name), re.MULTILINE | re.DOTALL)


def run_blocks(name: str, folder: Path, env: dict[str, str]) -> str:
    """What the commands of a skill print, run in their order in one shell."""
    lines = [f"echo '== {number}'\n{text}" for number, text in enumerate(blocks(name))]
    script = "\n".join(["set -euo pipefail", *lines])
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_both_skills_are_there() -> None:
    assert NAMES == ["codex-headless", "container-exec"]


@pytest.mark.parametrize("name", NAMES)
def test_the_head_of_a_skill_says_what_it_is(name: str) -> None:
    _, head, body = text_of(name).split("---\n", 2)
    fields = yaml.safe_load(head)
    assert set(fields) == {"name", "description"} and fields["name"] == name
    assert re.fullmatch(r"[a-z0-9-]{1,64}", name) and 50 < len(fields["description"]) <= 1024
    assert body.strip().startswith("# ") and blocks(name)
    assert set(re.findall(r"^```(\w*)$", text_of(name), re.MULTILINE)) == {"bash", ""}


@pytest.mark.parametrize("name", NAMES)
def test_commands_and_options_that_the_text_names_exist(name: str) -> None:
    prose = re.sub(r"^```bash\n.*?^```$", "", text_of(name), flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`]+)`", prose)
    named = {words for span in spans if (words := re.match(r"orchestrate ([a-z]+(?: [a-z]+)*)", span))}
    for found in {match[1] for match in named}:
        done = subprocess.run([f"{PROGRAMS}/orchestrate", *found.split(), "--help"], capture_output=True, timeout=60)
        assert done.returncode == 0, found
    if name == "container-exec":
        shown = subprocess.run([f"{PROGRAMS}/orchestrate", "job", "run", "--help"], capture_output=True, text=True)
        others = "--lines --run --wait --timeout --json"
        options = {option for span in spans for option in re.findall(r"--[a-z-]+", span)}
        assert {option for option in options if option not in shown.stdout and option not in others} == set()


@pytest.mark.docker
@pytest.mark.temporal
def test_every_command_of_container_exec_runs(tmp_path: Path, small_image: str) -> None:
    foreign = ("ORCHESTRATE_", "TEMPORAL_", "SYGALDRY_", "RAY_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    env |= {
        "PATH": f"{PROGRAMS}:{env['PATH']}",
        "ORCHESTRATE_HOME": str(tmp_path / "home"),
        "SYGALDRY_CONTAINER_ROOT": str(tmp_path / "root"),
        "SYGALDRY_IMAGE": small_image,
    }
    (tmp_path / "project").mkdir()
    try:
        shown = run_blocks("container-exec", tmp_path / "project", env)
    finally:
        services.stop(State(tmp_path / "home"))
    for text in ("step 3\n", "in /workspace\n", "no such table\n", "rc=3\n", "running pid=", "STOPPED job=train"):
        assert text in shown, shown
    assert "the token is there\n" in shown and "not-a-real-token" not in shown


def test_every_command_of_codex_headless_runs(codex: Codex) -> None:
    shown = run_blocks("codex-headless", codex.skill, codex.env)
    assert "all is well\n" in shown and shown.count("turn.completed") == 3
    look, change = codex.calls()
    assert look["argv"] == [
        "exec", "--json", "--model", "o4-mini", "--cd", ".", "--sandbox", "read-only",
        "--output-last-message", "answer.md", "--", "Which functions here have no test? Answer with a list.",
    ]  # fmt: skip
    assert change["argv"] == [
        "exec", "--full-auto", "--json", "--model", "o4-mini", "--cd", ".", "--sandbox", "workspace-write",
        "--", "Make the failing test pass. Change no test.",
    ]  # fmt: skip
    assert look["stdin"] == change["stdin"] == ""


def test_the_log_is_what_was_shown_and_the_exit_code_is_kept(codex: Codex, tmp_path: Path) -> None:
    prompt = "--not an option\n'quoted' \"twice\" $HOME `id`"
    output, errors = codex("--prompt", prompt, "--workdir", str(tmp_path), "--model=m 1", code=7, CODEX_EXIT="7")
    (log,) = (codex.skill / "logs").glob("codex-*.jsonl")
    assert (
        log.read_text() == output and [json.loads(line)["type"] for line in output.splitlines()][-1] == "turn.completed"
    )
    assert errors == f"log: {log}\n"
    (call,) = codex.calls()
    assert call["argv"][-2:] == ["--", prompt] and {str(tmp_path), "m 1"} <= set(call["argv"])


def test_an_option_that_codex_no_longer_has_is_left_away(codex: Codex) -> None:
    codex("--prompt", "x", CODEX_HELP="  -s, --sandbox <MODE>\n      --json")
    codex("--prompt", "x", CODEX_HELP="  -s, --sandbox <MODE>\n      --full-auto")
    assert ["--full-auto" in call["argv"] for call in codex.calls()] == [False, True]
    assert [call["argv"].count("workspace-write") for call in codex.calls()] == [1, 1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_ends_the_script_ends_codex(codex: Codex, number: int) -> None:
    process = codex.command("--prompt", "x", CODEX_SLEEP="600")
    deadline = time.monotonic() + PATIENCE_S
    while not codex.calls():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0
    (call,) = codex.calls()
    with pytest.raises(ProcessLookupError):
        os.kill(call["pid"], 0)


def test_codex_is_ended_when_its_time_is_over(codex: Codex) -> None:
    codex("--prompt", "x", "--timeout", "1", code=124, CODEX_SLEEP="600")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "there is no prompt"),
        (["--prompt"], 2, "has no value"),
        (["--prompt", "x", "--bogus"], 2, "`--bogus`"),
        (["--prompt", "x", "stray"], 2, "`stray`"),
        (["--prompt", "x", "--workdir", "nowhere"], 2, "`nowhere` is not a folder"),
        (["--prompt", "x", "--sandbox", "none"], 2, "`none`"),
        (["--prompt", "x", "--timeout", "soon"], 2, "`soon`"),
    ],
)
def test_wrong_usage_says_what_is_wanted(codex: Codex, words: list[str], code: int, said: str) -> None:
    _, errors = codex(*words, code=code)
    assert said in errors and "hint: " in errors and codex.calls() == []


def test_help_and_a_machine_without_codex(codex: Codex) -> None:
    assert "--sandbox MODE" in codex("--help")[0]
    assert "not on PATH" in codex("--prompt", "x", code=127, PATH="/usr/bin:/bin")[1]
