"""The bound beside every run, from the calibrations that there are."""

from collections.abc import Sequence
from statistics import median

from rl.bench.bound import bound
from rl.bench.cells import CalibrationKey, calibration_of
from rl.bench.results import Bound, Calibration, CalibrationRun, CellRun


def bounded(runs: Sequence[CellRun], calibrations: Sequence[CalibrationRun]) -> tuple[CellRun, ...]:
    """The runs, each with its bound where there is a calibration for it.

    It is one by the run's own stack and seed, so that the lengths are the same; the median over repeats. Conversations
    that end by themselves have no bound: their work changes from update to update.
    """
    return tuple(run.model_copy(update={"bound": _bound(run, calibrations)}) for run in runs)


def _bound(run: CellRun, calibrations: Sequence[CalibrationRun]) -> Bound | None:
    if run.error or run.key.workload != "tail":
        return None
    wanted = calibration_of(run.key)
    found = [
        one.calibration
        for one in calibrations
        if one.calibration is not None and CalibrationKey.of(one) == wanted and one.seed == run.seed
    ]
    return bound(run.key.mode, _median(found)) if found else None


def _median(found: Sequence[Calibration]) -> Calibration:
    return Calibration(**{name: median(getattr(one, name) for one in found) for name in Calibration.model_fields})
