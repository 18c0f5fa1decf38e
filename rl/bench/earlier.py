"""What an earlier benchmark measured in a folder by the same code, machine and settings, so as not to do it again."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rl.bench.cells import CalibrationKey, Measurement
from rl.bench.config import BenchConfig
from rl.bench.extra import ExtraRequest
from rl.bench.results import CellKey, Machine, Results

_WHICH = ("stacks", "modes", "parts", "seeds", "repeats", "sweep")
"""Settings that say what is measured; by the others a measurement would be another one."""


class Earlier:
    """Measurements by what was asked for; those with an error are not among them."""

    def __init__(self, path: Path, config: BenchConfig, machine: Machine, commit: str) -> None:
        """Nothing where the file is missing, broken, or of anything else than now."""
        self.results: Results | None = None
        """Without what failed, and without simulations that are to be made of more than there was."""
        try:
            found = Results.model_validate_json(path.read_text())
        except (OSError, ValidationError):
            return
        settings = config.model_dump(mode="json", exclude=set(_WHICH))
        earlier = {name: value for name, value in found.config.items() if name not in _WHICH}
        if (earlier, found.machine, found.commit) != (settings, machine, commit):
            return
        self.results = found.model_copy(
            update={
                "runs": tuple(run for run in found.runs if not run.error),
                "calibrations": tuple(run for run in found.calibrations if not run.error),
                "recoveries": tuple(one for one in found.recoveries if not one.error),
                "transports": () if any(one.error for one in found.transports) else found.transports,
                "simulations": () if "simulation" in config.parts else found.simulations,
            }
        )

    def has(self, wanted: Measurement) -> bool:
        """Whether a run of a cell or a calibration is there."""
        if self.results is None:
            return False
        if isinstance(wanted.key, CellKey):
            runs = {(run.key, run.seed, run.repeat) for run in self.results.runs}
            return (wanted.key, wanted.seed, wanted.repeat) in runs
        calibrations = {(CalibrationKey.of(run), run.seed, run.repeat) for run in self.results.calibrations}
        return (wanted.key, wanted.seed, wanted.repeat) in calibrations

    def has_extra(self, wanted: ExtraRequest) -> bool:
        """Whether what is measured beside the cells is there."""
        if self.results is None:
            return False
        match wanted.part:
            case "peers":
                peers = {(run.seed, run.repeat) for run in self.results.runs if run.key.stack == "trl"}
                return (wanted.seed, wanted.repeat) in peers
            case "recovery":
                killed = {(one.stack, one.killed, one.seed) for one in self.results.recoveries}
                return (wanted.stack, wanted.killed, wanted.seed) in killed
            case "transports":
                return bool(self.results.transports)
            case "simulation":
                return False

    def with_its_own(self, config: dict[str, Any]) -> dict[str, Any]:
        """Settings that name what was measured then too."""
        if self.results is None:
            return config
        then: dict[str, Any] = self.results.config
        lists = {name: list(dict.fromkeys([*then[name], *config[name]])) for name in _WHICH if name != "repeats"}
        return {**config, **lists, "repeats": max(then["repeats"], config["repeats"])}
