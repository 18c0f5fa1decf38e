"""What an earlier benchmark measured in a folder by the same code, machine and settings, so as not to do it again."""

from pathlib import Path

from pydantic import ValidationError

from rl.bench.cells import CalibrationKey, Measurement
from rl.bench.config import BenchConfig
from rl.bench.extra import Extra, ExtraRequest
from rl.bench.results import CalibrationRun, CellRun, Machine, Results

_WHICH = {"stacks", "modes", "parts", "seeds", "repeats", "sweep"}
"""Settings that say what is measured; by the others a measurement would be another one."""


class Earlier:
    """Measurements by what was asked for; those with an error are not among them."""

    def __init__(self, path: Path, config: BenchConfig, machine: Machine, commit: str) -> None:
        """Nothing where the file is missing, broken, or of anything else than now."""
        self._results: Results | None = None
        try:
            found = Results.model_validate_json(path.read_text())
        except (OSError, ValidationError):
            return
        settings = config.model_dump(mode="json", exclude=_WHICH)
        earlier = {name: value for name, value in found.config.items() if name not in _WHICH}
        if (earlier, found.machine, found.commit) == (settings, machine, commit):
            self._results = found

    @property
    def started_at(self) -> str:
        """When that began; empty where there is nothing."""
        return self._results.started_at if self._results else ""

    @property
    def duration_s(self) -> float:
        """What that took."""
        return self._results.duration_s if self._results else 0.0

    def measured(self, wanted: Measurement) -> CellRun | CalibrationRun | None:
        """None where it was not."""
        if self._results is None:
            return None
        runs = {(run.key, run.seed, run.repeat): run for run in self._results.runs if not run.error}
        calibrations = {
            (CalibrationKey.of(run), run.seed, run.repeat): run for run in self._results.calibrations if not run.error
        }
        if isinstance(wanted.key, CalibrationKey):
            return calibrations.get((wanted.key, wanted.seed, wanted.repeat))
        return runs.get((wanted.key, wanted.seed, wanted.repeat))

    def extra(self, wanted: ExtraRequest) -> Extra | None:
        """None where it was not measured, and for a simulation, which is made of all that is there by now."""
        if self._results is None:
            return None
        found = Extra()
        if wanted.part == "peers":
            when = (wanted.seed, wanted.repeat)
            peers = [run for run in self._results.runs if run.key.stack == "trl" and (run.seed, run.repeat) == when]
            found = Extra(runs=tuple(run for run in peers if not run.error))
        elif wanted.part == "recovery":
            which = (wanted.stack, wanted.killed, wanted.seed)
            killed = [one for one in self._results.recoveries if (one.stack, one.killed, one.seed) == which]
            found = Extra(recoveries=tuple(one for one in killed if not one.error))
        elif wanted.part == "transports" and not any(one.error for one in self._results.transports):
            found = Extra(transports=self._results.transports)
        return None if found == Extra() else found
