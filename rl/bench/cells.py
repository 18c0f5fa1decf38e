"""The matrix: which cells there are, in which order they are measured, and the run that each is.

BenchConfig -> Measurement (calibration or cell, of a seed and repeat), interleaved -> RunConfig
"""

from collections.abc import Iterator
from typing import Self, TypeVar

from rl.bench.config import BenchConfig
from rl.bench.results import CalibrationRun, CellKey, Mode, WorkloadName
from rl.config import RunConfig
from rl.pinning import usable_cores
from rl.types import Frozen

Item = TypeVar("Item")

_NEVER = 10**6
"""More updates than a run has: it is stopped while work is in flight, as a long run would be, so that its last updates
are like all others; it makes no checkpoint between its first and its last moment."""


class CalibrationKey(Frozen):
    """The roles of one stack, to be measured each alone."""

    stack: str
    engine: str
    colocated: bool

    @classmethod
    def of(cls, run: CalibrationRun) -> Self:
        """What a run calibrated."""
        return cls(stack=run.stack, engine=run.engine, colocated=run.colocated)

    @property
    def label(self) -> str:
        """`ray`, with what is not usual behind it."""
        return " ".join([self.stack, *[self.engine] * (self.engine != "vllm"), *["colocated"] * self.colocated])


class Measurement(Frozen):
    """One child process of the benchmark."""

    key: CellKey | CalibrationKey
    seed: int
    repeat: int


def cells(config: BenchConfig) -> list[CellKey]:
    """All that are measured in one repeat, no two alike. With emulated accelerators none is about models or rewards."""
    found: list[CellKey] = []
    emulated = config.emulate_accelerators
    usual = "emulated" if emulated else "vllm"

    def add(
        stack: str, mode: Mode, *, engine: str = usual, workload: WorkloadName = "tail", staleness: int = -1
    ) -> None:
        found.append(
            CellKey(
                stack=stack,
                mode=mode,
                engine=engine,
                workload=workload,
                placement="emulated" if emulated else "pinned",
                num_generators=config.num_generators,
                max_staleness=_staleness(config, mode) if staleness < 0 else staleness,
            )
        )

    if "matrix" in config.parts:
        for mode in config.modes:
            for stack in config.stacks:
                add(stack, mode)
    if "control" in config.parts and not emulated:
        for mode in config.modes:
            add("local", mode, engine="hf")
    if "sweep" in config.parts:
        for staleness in config.sweep:
            add("local", _mode(staleness), staleness=staleness)
    if "learning" in config.parts and not emulated:
        learning: list[Mode] = [mode for mode in config.modes if mode in ("sync", "async")]
        for mode in learning:
            for stack in config.stacks[:1] if config.quick else config.stacks:
                add(stack, mode, workload="task")
    return list(dict.fromkeys(found))


def calibration_of(cell: CellKey) -> CalibrationKey:
    """The one that a cell's bound is made of."""
    return CalibrationKey(stack=cell.stack, engine=cell.engine, colocated=cell.mode == "sync-colocated")


def schedule(config: BenchConfig) -> list[Measurement]:
    """Everything in the order of its measurement: each repeat goes through all, beginning at another one, so that no
    cell has always the same neighbours or the same time of the day. A calibration stands in the midst of the cells
    whose bound it makes: a machine that is slower for some minutes is so for both. The modes of one stack are near each
    other for that, those of two stacks some minutes apart: it takes several repeats to tell stacks apart."""
    together: dict[CalibrationKey | CellKey, list[CellKey]] = {}
    for cell in cells(config):
        together.setdefault(calibration_of(cell) if cell.workload == "tail" else cell, []).append(cell)
    planned = []
    passes = [(repeat, seed) for repeat in range(config.repeats) for seed in config.seeds]
    for number, (repeat, seed) in enumerate(passes):
        for key in _rotated(list(together), number * max(1, len(together) // len(passes))):
            of_key: list[CellKey | CalibrationKey] = [*_rotated(together[key], number)]
            if isinstance(key, CalibrationKey):
                of_key.insert(len(of_key) // 2, key)
            planned += [Measurement(key=one, seed=seed, repeat=repeat) for one in of_key]
    return planned


def run_config(config: BenchConfig, key: CellKey, seed: int) -> RunConfig:
    """The run that a cell is; `rl.bench.cell` stops it after its measured updates."""
    trainer, generators = cores_of(config)
    together = sorted({*trainer, *(core for cores in generators for core in cores)})
    colocated, tail = key.mode == "sync-colocated", key.workload == "tail"
    turns = {"max_turns": 1, "lengths": config.lengths} if tail else {"max_tokens_per_turn": config.max_tokens_per_turn}
    return RunConfig.model_validate(
        {
            "stack": key.stack,
            "model": config.model,
            "tasks": [config.task],
            "updates": _NEVER,
            "seed": seed,
            "groups_per_update": config.groups_per_update,
            "group_size": config.group_size,
            "max_staleness": key.max_staleness,
            "stale_policy": config.stale_policy,
            "filter_zero_variance": not tail,
            "rollout": {"max_tokens": config.max_tokens, "prompt_style": config.prompt_style, **turns},
            "engine": {
                "name": key.engine,
                "max_model_tokens": config.max_tokens,
                "cache_gb": config.cache_gb,
                "num_threads": config.colocated_engine_threads if colocated else 1,
                "cores": [together] if colocated else generators,
                "emulation": config.emulated_engine if key.placement == "emulated" else None,
            },
            "learner": {
                "learning_rate": config.learning_rate,
                "num_threads": len(together) if colocated else 1,
                "cores": together if colocated else trainer,
                "emulation": config.emulated_learner if key.placement == "emulated" else None,
            },
            "num_generators": key.num_generators,
            "groups_in_flight": config.groups_in_flight,
            "checkpoint_every": _NEVER,
            "stuck_after_s": config.cell_timeout_s,
        }
    )


def num_updates(config: BenchConfig, key: CellKey) -> int:
    """Measured ones of a cell."""
    return config.learning_updates if key.workload == "task" else config.updates


def cores_of(config: BenchConfig) -> tuple[list[int], list[list[int]]]:
    """Those of the trainer, and those of each generator. On a machine with one core the roles share it."""
    cores = config.cores or usable_cores()[: 1 + config.num_generators]
    return cores[:1], [[core] for core in cores[1:] or cores]


def _staleness(config: BenchConfig, mode: Mode) -> int:
    return {"one-step": 1, "async": config.staleness}.get(mode, 0)


def _mode(staleness: int) -> Mode:
    if staleness < 2:
        return "one-step" if staleness else "sync"
    return "async"


def _rotated(items: list[Item], by: int) -> Iterator[Item]:
    start = by % len(items) if items else 0
    yield from items[start:]
    yield from items[:start]
