"""Call a Python function with JSON arguments; what it returns is the step's outputs."""

import importlib
import inspect
import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from steps import Context, Frozen, Outputs, StepError


def _is_call(value: str) -> str:
    module, _, function = value.partition(":")
    if "${{" in value or (module and function):
        return value
    raise ValueError(f"got `{value}`, wanted `module:function`")


class Params(Frozen):
    call: Annotated[str, AfterValidator(_is_call)]
    """`module:function`. The module is looked up in the plan's folder first, then as an installed one."""
    arguments: dict[str, Any] = {}
    """Keyword arguments. A parameter called `context` receives the step's `Context`."""


def run(params: Params, context: Context) -> Outputs:
    function = _find(params.call)
    arguments = dict(params.arguments)
    signature = _signature(function)
    if signature is not None:
        if "context" in signature.parameters and "context" not in arguments:
            arguments["context"] = context
        try:
            signature.bind(**arguments)
        except TypeError as error:
            got = ", ".join(sorted(params.arguments)) or "nothing"
            raise StepError(f"`{params.call}` got {got}, wanted `{signature}`: {error}") from None
    value = function(**arguments)
    if value is None:
        return {}
    return value if isinstance(value, dict) else {"result": value}


def code_files(params: Params, plan_dir: Path) -> list[Path]:
    """The module's file when it is one of the plan's own; an installed module changes with its package's version."""
    module = plan_dir.joinpath(*params.call.partition(":")[0].split("."))
    return [path for path in (module.with_suffix(".py"), module / "__init__.py") if path.is_file()]


def _signature(function: Any) -> inspect.Signature | None:
    """None for a function written in C that does not tell."""
    try:
        return inspect.signature(function)
    except ValueError:
        return None


def _find(call: str) -> Any:
    module_name, _, function_name = call.partition(":")
    if not module_name or not function_name:
        raise StepError(f"`call` is `{call}`, wanted `module:function`")
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        folders = ", ".join(f"`{folder}`" for folder in sys.path[:2])
        raise StepError(f"module `{error.name}` of `{call}` is not found\n\nhint: looked first in {folders}") from error
    function = module
    for part in function_name.split("."):
        if not hasattr(function, part):
            raise StepError(f"module `{module_name}` has no `{function_name}`")
        function = getattr(function, part)
    if not callable(function):
        raise StepError(f"`{function_name}` of module `{module_name}` is not callable")
    return function
