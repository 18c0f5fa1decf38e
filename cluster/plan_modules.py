"""Modules of a plan's folder in a warm actor: forgotten when the plan or one of their files is another one."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

_OWN = ("bridge", "cluster", "container", "rl", "steps")


class PlanModules:
    """Keeps `sys.modules` free of stale modules of plans; an unchanged plan's stay loaded and keep their state."""

    def __init__(self) -> None:
        self._plan_dir: Path | None = None
        self._stamps: dict[str, tuple[int, int]] = {}

    def prepare(self, plan_dir: Path) -> None:
        """Call before a step: drops the modules of another plan, or all of this one's when a file has changed."""
        if self._plan_dir is not None and (self._plan_dir != plan_dir or self._stamps != self._read_stamps()):
            for name in list(_modules_under(self._plan_dir)):
                del sys.modules[name]
        importlib.invalidate_caches()
        self._plan_dir = plan_dir

    def remember(self) -> None:
        """Call after a step: notes the state of the files it has imported."""
        self._stamps = self._read_stamps()

    def _read_stamps(self) -> dict[str, tuple[int, int]]:
        assert self._plan_dir is not None
        return {name: _stamp(path) for name, path in _modules_under(self._plan_dir).items()}


def _modules_under(plan_dir: Path) -> dict[str, Path]:
    prefix = f"{plan_dir}/"
    return {
        name: Path(str(module.__file__))
        for name, module in list(sys.modules.items())
        if isinstance(module, ModuleType)
        and str(getattr(module, "__file__", None) or "").startswith(prefix)
        and "/site-packages/" not in str(module.__file__)
        and name != "__main__"
        and name.partition(".")[0] not in _OWN
    }


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size
