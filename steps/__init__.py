"""The step author's contract: a step type is a module with `Params` and `run(params, context) -> Outputs`.

    class Params(Frozen):
        url: str

    def run(params: Params, context: Context) -> Outputs:
        return {"size": 3}

A built-in type is a file in this folder, found by its name; other packages add theirs by an entry point in the group
`sygaldry_ray.steps` whose value is the module. Optional names in a module: `Outputs` (a `Frozen` model that declares
the names of the outputs), `code_files(params, plan_dir)` (files whose content is part of the step's cache key),
`identities(params, plan_dir, env)` (what else the result depends on that params only name, such as what is in an image
now: texts by name, part of the cache key; asked in the worker, quick, and without errors),
`drives_engine = True` (`run` talks to the container engine: the plan's `image` is not meant for such a step) and
`reusable_process = True` (`run` only starts programs and leaves no trace in its process: no module, thread, setting or
open file; the process may then run further attempts, which saves most of what a short step costs).
Heavy imports (ray, torch, docker, huggingface_hub) belong inside `run`: the schema of every type is read by `--help`.
"""

from steps._contract import (
    Context,
    Frozen,
    Gang,
    Outputs,
    PlanPath,
    Shell,
    StepCancelled,
    StepError,
    StepFailed,
    StepTimedOut,
)
from steps._request import Progress, StepRequest, StepResult

__all__ = [
    "Context",
    "Frozen",
    "Gang",
    "Outputs",
    "PlanPath",
    "Progress",
    "Shell",
    "StepCancelled",
    "StepError",
    "StepFailed",
    "StepRequest",
    "StepResult",
    "StepTimedOut",
]
