"""The `command` step, run by the real host."""

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from steps import StepResult

Run = Callable[..., Awaitable[StepResult]]


def script(path: Path, text: str, mode: int = 0o755) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(mode)
    return path


def stdout(result: StepResult) -> str:
    return (Path(result.attempt_dir) / "stdout.log").read_text()


async def test_arguments_are_passed_as_they_are(run_locally: Run) -> None:
    result = await run_locally(params={"command": "printf", "args": ["%s|", "a b", "$HOME", "*", "", "é\n"]})
    assert stdout(result) == "a b|$HOME|*||é\n|"


async def test_exit_codes_and_signals_are_told(run_locally: Run) -> None:
    for number, (text, code) in enumerate((("exit 3", 3), ("kill -9 $$", 137), ("exit 255", 255))):
        result = await run_locally(f"s{number}", params={"command": "sh", "args": ["-c", text]})
        assert (result.outcome, result.reason, result.exit_code, result.final) == ("failed", "exit_code", code, False)
        assert result.error == f"`sh` ended with exit code {code}"


async def test_programs_are_found_with_the_steps_own_path(run_locally: Run, tmp_path: Path) -> None:
    script(tmp_path / "bin" / "only-here", "echo found")
    path = f"{tmp_path / 'bin'}:{os.defpath}"
    assert stdout(await run_locally("a", params={"command": "only-here"}, env={"PATH": path})) == "found\n"
    result = await run_locally("b", params={"command": "only-here"})
    assert (result.outcome, result.final) == ("failed", True)
    assert "program `only-here` is not on the step's PATH" in result.error


async def test_a_name_with_a_slash_is_relative_to_the_working_directory(run_locally: Run, tmp_path: Path) -> None:
    script(tmp_path / "work" / "tool", "pwd")
    result = await run_locally(params={"command": "./tool"}, working_dir=str(tmp_path / "work"))
    assert stdout(result) == f"{tmp_path / 'work'}\n"


async def test_what_cannot_be_started_is_one_clear_error(run_locally: Run, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"command": "./missing"}, "No such file"),
        ({"command": str(script(tmp_path / "plain", "true", 0o644))}, "Permission denied"),
        ({"command": "true", "args": ["\0"]}, "null byte"),
        ({"command": ""}, "is empty"),
    ]
    for number, (params, text) in enumerate(cases):
        result = await run_locally(f"s{number}", params=params)
        assert (result.outcome, result.final) == ("failed", True), result
        assert text in result.error and "Traceback" not in result.error


async def test_standard_input_is_empty_and_a_child_gets_default_signals(run_locally: Run) -> None:
    script = "cat; grep SigIgn /proc/self/status; ls /proc/self/fd"
    result = await run_locally(params={"command": "sh", "args": ["-c", script]})
    ignored, *descriptors = stdout(result).splitlines()
    assert int(ignored.split()[1], 16) & (1 << 12 | 1 << 1 | 1 << 14) == 0, "SIGPIPE, SIGINT, SIGTERM"
    assert len(descriptors) == 4, "stdin, stdout, stderr and what `ls` has opened"
