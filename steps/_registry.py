"""Step types, found by file name in `steps/` or by entry point; listing them imports none of them."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

import steps
from steps._contract import Context, Frozen, Outputs, StepError

ENTRY_POINT_GROUP = "sygaldry_ray.steps"


class StepType:
    """One step type: its module, loaded when first asked for."""

    def __init__(self, name: str, module: str) -> None:
        self.name = name
        self.module_name = module

    @property
    def module(self) -> Any:
        """The module itself."""
        return importlib.import_module(self.module_name)

    @property
    def params(self) -> type[Frozen]:
        """The model of the step's own fields."""
        return cast("type[Frozen]", self.module.Params)

    @property
    def run(self) -> Callable[[Any, Context], Outputs | None]:
        """The function that does the work."""
        return cast("Callable[[Any, Context], Outputs | None]", self.module.run)

    @property
    def outputs(self) -> type[Frozen] | None:
        """The declared outputs, or None when the type cannot know them."""
        declared = getattr(self.module, "Outputs", None)
        return declared if isinstance(declared, type) and issubclass(declared, Frozen) else None

    @property
    def reusable_process(self) -> bool:
        """True when `run` leaves no trace in its process, which may then run further attempts."""
        return getattr(self.module, "reusable_process", False) is True

    @property
    def drives_engine(self) -> bool:
        """True when the step starts or makes containers: it runs beside the engine, never in an image itself."""
        return getattr(self.module, "drives_engine", False) is True

    @property
    def summary(self) -> str:
        """First line of the module's docstring."""
        return (self.module.__doc__ or "").strip().partition("\n")[0]

    @property
    def source(self) -> Path:
        """The module's file; its content is part of a cache key."""
        return Path(self.module.__file__)


@lru_cache(maxsize=1)
def step_types() -> dict[str, StepType]:
    """All step types by name. A built-in name wins, so no package can quietly replace one."""
    plugins = {point.name: StepType(point.name, point.value) for point in entry_points(group=ENTRY_POINT_GROUP)}
    built_in = {
        info.name: StepType(info.name, f"steps.{info.name}")
        for info in pkgutil.iter_modules(steps.__path__)
        if not info.name.startswith("_")
    }
    return dict(sorted({**plugins, **built_in}.items()))


def find(name: str) -> StepType:
    """The step type called `name`; `StepError` with the nearest known name when there is none."""
    known = step_types()
    if name in known:
        return known[name]
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean `{nearest[0]}`?" if nearest else f"known types: {', '.join(known)}"
    raise StepError(f"unknown step type `{name}`\n\nhint: {hint}")
