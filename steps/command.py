"""Run a program directly, without a shell, in the step's working directory."""

import os
from pathlib import Path

from steps import Context, Frozen, Outputs, StepFailed

reusable_process = True
SCRIPTS = (".bash", ".jl", ".js", ".lua", ".pl", ".py", ".r", ".rb", ".sh", ".ts")


class Params(Frozen):
    command: str
    """Program to run, looked up with the step's PATH; a name with a slash is relative to the working directory."""
    args: list[str] = []
    """Arguments, passed as they are."""


def run(params: Params, context: Context) -> Outputs:
    exit_code = context.run_process([params.command, *params.args])
    if exit_code != 0:
        raise StepFailed(f"`{Path(params.command).name}` ended with exit code {exit_code}", exit_code)
    return {}


def code_files(params: Params, folder: Path) -> list[Path]:
    """The program and the scripts among its arguments, where they are files of the plan's own."""
    names = [params.command] if "/" in params.command else []
    names += [argument for argument in params.args if argument.lower().endswith(SCRIPTS)]
    paths = [Path(os.path.normpath(folder / name)) for name in names]
    # Not `Path.is_file`: an argument that is too long for a file name is no file, and no error.
    return [path for path in paths if path.is_relative_to(folder) and os.path.isfile(path)]  # noqa: PTH113
