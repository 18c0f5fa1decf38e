"""Build a package with its own build command: like `command`, with everything in one block."""

from steps import Context, Frozen, Outputs, PlanPath, StepFailed

reusable_process = True


class Params(Frozen):
    command: str
    """Program to run, looked up with the step's PATH."""
    args: list[str] = []
    """Arguments, passed as they are."""
    env: dict[str, str] = {}
    """Added to the step's environment."""
    working_dir: PlanPath = ""
    """Where to run it; the step's working directory by default."""


def run(params: Params, context: Context) -> Outputs:
    exit_code = context.run_process(
        [params.command, *params.args],
        env=params.env,
        working_dir=context.plan_dir / params.working_dir if params.working_dir else None,
    )
    if exit_code != 0:
        raise StepFailed(f"`{params.command}` ended with exit code {exit_code}", exit_code)
    return {}
