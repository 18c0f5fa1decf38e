"""Run a program directly, without a shell, in the step's working directory."""

from pathlib import Path

from steps import Context, Frozen, Outputs, StepFailed


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
