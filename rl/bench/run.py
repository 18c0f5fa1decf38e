"""A whole benchmark: every measurement in a process of its own, one after the other, kept as soon as it is there.

    BenchConfig -> schedule -> [ child -> CellRun | CalibrationRun | Extra -> results.json ]* -> report.html

A measurement that fails is kept with its error, and the next one begins.
"""

import asyncio
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from rl.bench.bounded import bounded
from rl.bench.calibrate import CalibrationRequest
from rl.bench.cell import CellRequest
from rl.bench.cells import CalibrationKey, Measurement, run_config, schedule
from rl.bench.child import ChildFailed, measure_apart
from rl.bench.config import BenchConfig
from rl.bench.earlier import Earlier
from rl.bench.extra import Extra, ExtraRequest
from rl.bench.machine import commit, load, machine
from rl.bench.progress import Progress, Report
from rl.bench.recovery import Killed, can_be_killed
from rl.bench.results import CalibrationRun, CellKey, CellRun, Recovery, Results, Simulation, Transport

RESULTS, REPORT = "results.json", "report.html"

_EXTRA_TIMEOUT_S = 1800.0
_KILLED: tuple[Killed, ...] = ("generator", "trainer")


class Bench:
    """One benchmark in one folder."""

    def __init__(self, config: BenchConfig, folder: Path, report: Report, *, resume: bool = False) -> None:
        """With `resume`, what was measured in the folder by the same code, machine and settings without an error is
        kept, and what is missing is added; other seeds, stacks, modes or parts than then may be wanted now."""
        self._config = config
        self._folder = folder
        self._report = report
        self._began = time.monotonic()
        self._machine, self._commit = machine(), commit()
        self._measurements = schedule(config)
        self._extras = list(extras(config))
        self._done = 0
        self._config_known = config.model_dump(mode="json")
        self._started_at, self._earlier_s = datetime.now(UTC).isoformat(timespec="seconds"), 0.0
        self.runs: list[CellRun] = []
        self.calibrations: list[CalibrationRun] = []
        self.recoveries: list[Recovery] = []
        self.transports: list[Transport] = []
        self.simulations: list[Simulation] = []
        self._earlier = Earlier(folder / RESULTS, config, self._machine, self._commit) if resume else None
        if self._earlier is not None and (found := self._earlier.results) is not None:
            self._config_known = self._earlier.with_its_own(self._config_known)
            self._started_at, self._earlier_s = found.started_at, found.duration_s
            self.calibrations += found.calibrations
            self._add(found)

    async def run(self) -> Results:
        """To the last measurement. What is there when this is cancelled is in the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        await self._prepare_models()
        for number, measurement in enumerate(self._measurements):
            if self._earlier is not None and self._earlier.has(measurement):
                self._done += 1
            elif isinstance(measurement.key, CellKey):
                await self._cell(measurement, measurement.key, number)
            else:
                await self._calibrate(measurement, measurement.key, number)
        for number, extra in enumerate(self._extras):
            if self._earlier is not None and self._earlier.has_extra(extra):
                self._done += 1
            else:
                await self._extra(extra, number)
        return self.results

    @property
    def results(self) -> Results:
        """So far."""
        return Results(
            started_at=self._started_at,
            duration_s=self._earlier_s + time.monotonic() - self._began,
            commit=self._commit,
            quick=self._config.quick,
            config=self._config_known,
            machine=self._machine,
            runs=bounded(self.runs, self.calibrations),
            calibrations=tuple(self.calibrations),
            recoveries=tuple(self.recoveries),
            transports=tuple(self.transports),
            simulations=tuple(self.simulations),
        )

    def _add(self, found: Extra | Results) -> None:
        self.runs += found.runs
        self.recoveries += found.recoveries
        self.transports += found.transports
        self.simulations += found.simulations

    async def _prepare_models(self) -> None:
        """They are there before anything is timed."""
        from rl.hosting import model_folder

        for seed in self._config.seeds:
            key = next((one.key for one in self._measurements if isinstance(one.key, CellKey)), None)
            if key is not None:
                await asyncio.to_thread(model_folder, run_config(self._config, key, seed))

    async def _cell(self, measurement: Measurement, key: CellKey, order: int) -> None:
        run = CellRun(key=key, seed=measurement.seed, repeat=measurement.repeat, order=order, load_before=load())
        label = f"{key.label}, seed {run.seed}"
        self._say(label)
        folder = self._place(order, label)
        request = CellRequest(config=self._config, run=run, folder=str(folder.absolute()))
        try:
            run = await measure_apart("rl.bench.cell", request, CellRun, folder, self._config.cell_timeout_s)
        except ChildFailed as failed:
            run = run.model_copy(update={"error": str(failed)})
        self.runs.append(run)
        found = run.error or f"{run.duration_s / run.num_updates:.3f} s an update"
        self._keep(f"{label}: {found}", failed=bool(run.error))

    async def _calibrate(self, measurement: Measurement, key: CalibrationKey, order: int) -> None:
        label = f"calibrate {key.label}, seed {measurement.seed}"
        self._say(label)
        request = CalibrationRequest(config=self._config, key=key, seed=measurement.seed, repeat=measurement.repeat)
        folder, error = self._place(order, label), ""
        try:
            run = await measure_apart(
                "rl.bench.calibrate", request, CalibrationRun, folder, self._config.cell_timeout_s
            )
        except ChildFailed as failed:
            error = str(failed)
            run = CalibrationRun(
                stack=key.stack,
                engine=key.engine,
                colocated=key.colocated,
                seed=measurement.seed,
                repeat=measurement.repeat,
                error=error,
            )
        self.calibrations.append(run)
        parts = run.calibration
        found = error if parts is None else f"T_g {parts.generate_batch_s:.3f} s, T_t {parts.update_s:.3f} s"
        self._keep(f"{label}: {found}", failed=bool(error))

    async def _extra(self, request: ExtraRequest, order: int) -> None:
        label = _label(request)
        self._say(label)
        if request.part == "simulation":
            request = request.model_copy(update={"results": self.results})
        folder = self._place(len(self._measurements) + order, label)
        request = request.model_copy(update={"folder": str(folder.absolute())})
        try:
            found = await measure_apart("rl.bench.extra", request, Extra, folder, _EXTRA_TIMEOUT_S)
        except ChildFailed as failed:
            self._keep(f"{label}: {failed}", failed=True)
            return
        self._add(found)
        errors = [run.error for run in found.runs] + [one.error for one in found.recoveries]
        self._keep(": ".join([label, *filter(None, errors)]), failed=any(errors))

    def _place(self, order: int, label: str) -> Path:
        """Where a measurement leaves what it says."""
        words = "".join(letter if letter.isalnum() else "-" for letter in label)
        return self._folder / "measurements" / f"{order:03d}-{words}"

    def _say(self, text: str) -> None:
        self._report(Progress(done=self._done, total=self._total, text=text))

    def _keep(self, text: str, failed: bool = False) -> None:
        """Write everything down, and say so."""
        self._done += 1
        write_results(self.results, self._folder / RESULTS)
        self._report(Progress(done=self._done, total=self._total, text=text, found=True, failed=failed))

    @property
    def _total(self) -> int:
        return len(self._measurements) + len(self._extras)


def write_results(results: Results, path: Path) -> None:
    """As a whole or not at all."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(results.model_dump_json(indent=1))
    beside.replace(path)


def extras(config: BenchConfig) -> Iterator[ExtraRequest]:
    """What is measured after the cells, in its order."""
    emulated = config.emulate_accelerators
    if "peers" in config.parts and not emulated:
        for repeat in range(config.repeats):
            for seed in config.seeds:
                yield ExtraRequest(part="peers", config=config, seed=seed, repeat=repeat)
    if "transports" in config.parts:
        yield ExtraRequest(part="transports", config=config)
    if "recovery" in config.parts and not emulated:
        for seed in config.seeds:
            for stack in config.stacks:
                for killed in (one for one in _KILLED if can_be_killed(stack, one)):
                    yield ExtraRequest(part="recovery", config=config, seed=seed, stack=stack, killed=killed)
    if "simulation" in config.parts:
        yield ExtraRequest(part="simulation", config=config)


def _label(request: ExtraRequest) -> str:
    match request.part:
        case "peers":
            return f"peer trl, seed {request.seed}"
        case "recovery":
            return f"{request.stack} without its {request.killed}, seed {request.seed}"
        case _:
            return request.part
