"""`.ci/check`, the one-shot validation: every check runs, and what could not be checked is said."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = Path(sys.executable).parent


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of shell and YAML, with no more tools than that needs."""
    for folder in (".ci", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "check", tmp_path / ".ci")
    for tool in ("shellcheck", "yamllint", "git", "bash", "xargs", "grep", "dirname"):
        program = TOOLS / tool if (TOOLS / tool).exists() else shutil.which(tool)
        (tmp_path / ".venv/bin" / tool).symlink_to(program)
    for tool in ("ruff", "mypy", "lint-imports"):
        (tmp_path / ".venv/bin" / tool).symlink_to("/bin/true")
    (tmp_path / "run.sh").write_text('#!/usr/bin/env bash\necho "$1"\n')
    (tmp_path / "plan.yaml").write_text("name: x\nsteps: []\n")
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True, timeout=60)
    return tmp_path


def check(project: Path) -> tuple[int, str]:
    environment = {**os.environ, "PATH": str(project / ".venv/bin")}
    done = subprocess.run(
        ["/bin/bash", project / ".ci/check"], env=environment, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


def test_what_is_right_passes_and_what_is_not_there_is_said(project: Path) -> None:
    code, said = check(project)
    assert code == 0 and "6 checks passed, 0 failed, 0 skipped" in said
    assert "== Dockerfile: there are no such files" in said and "== JavaScript: there are no such files" in said


def test_a_tool_that_is_missing_is_said(project: Path) -> None:
    (project / "Dockerfile").write_text("FROM scratch\n")
    (project / "page.js").write_text("let a = 1;\n")
    code, said = check(project)
    assert code == 0 and "== Dockerfile: skipped, hadolint is not installed" in said
    assert "2 skipped (Dockerfile,JavaScript)" in said


def test_every_check_runs_although_an_earlier_one_has_failed(project: Path) -> None:
    (project / ".venv/bin/mypy").unlink()
    (project / ".venv/bin/mypy").symlink_to("/bin/false")
    (project / "run.sh").write_text("#!/usr/bin/env bash\nrm $1/*\n")
    (project / "plan.yaml").write_text("name: x\nname: y\n")
    code, said = check(project)
    assert code == 1 and "SC2086" in said and "key-duplicates" in said
    assert "3 failed (Python: types,shell,YAML)" in said


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_javascript_is_checked_file_by_file(project: Path) -> None:
    (project / ".venv/bin/node").symlink_to(str(shutil.which("node")))
    (project / "a.js").write_text("let a = 1;\n")
    (project / "b.js").write_text("let b = ;\n")
    code, said = check(project)
    assert code == 1 and "1 failed (JavaScript)" in said and "b.js" in said


@pytest.mark.skipif(not (TOOLS / "hadolint").exists(), reason="hadolint is not installed")
def test_dockerfiles_are_checked(project: Path) -> None:
    (project / ".venv/bin/hadolint").symlink_to(TOOLS / "hadolint")
    (project / "Dockerfile").write_text("FROM debian:12\nRUN cd /tmp\n")
    code, said = check(project)
    assert code == 1 and "DL3003" in said
