"""What the benchmark found, as data: the schema of `results.json`.

A cell is one combination of stack, mode, engine and workload; a run is one measurement of a cell by one seed. Seconds
are wall time unless named otherwise. Warm-up updates are in no number but `start_up` and `rewards`.
"""

from statistics import median
from typing import Literal

from rl.types import Frozen
from rl.types import Mismatch as Mismatch

SCHEMA_VERSION = 1

Mode = Literal["sync-colocated", "sync", "one-step", "async"]
"""`sync-colocated`: both roles have all cores, in turns; the others have one core per role: `sync`: in turns;
`one-step`: at most one version behind; `async`: at most `BenchConfig.staleness` behind."""
WorkloadName = Literal["tail", "task"]
"""`tail`: every sample has a length drawn from a long-tailed distribution by the seed, so every cell does the same
work; `task`: real conversations, whose lengths and rewards change as the policy learns."""
Placement = Literal["pinned", "emulated", "simulated"]
"""`pinned`: real compute, one core per role; `emulated`: real processes, messages and weights, device time slept;
`simulated`: virtual time, by latency models that were fitted to measured calls."""
Role = Literal["loop", "trainer", "generator"]


class CellKey(Frozen):
    """What is measured."""

    stack: str
    """`local`, `ray`, `monarch`, `hybrid`; `trl` for the peer."""
    mode: Mode
    engine: str = "vllm"
    workload: WorkloadName = "tail"
    placement: Placement = "pinned"
    num_generators: int = 1
    max_staleness: int = 0

    @property
    def label(self) -> str:
        """`ray async`, with what is not usual behind it."""
        unusual = [self.engine] * (self.engine != "vllm") + [self.workload] * (self.workload != "tail")
        unusual += [f"{self.num_generators} generators"] * (self.num_generators != 1)
        return " ".join([self.stack, self.mode, *unusual])


class Accounting(Frozen):
    """Where every token and every sample went, from the first to the last update, warm-up included:
    `generated == trained + wasted + in_flight`."""

    generated: int
    trained: int
    wasted: int
    in_flight: int
    """Of groups that were finished, and not trained on, when the run ended. What was sampled by then of others is known
    to the engines alone, and neither here nor in `generated`."""
    consumed_trajectories: int
    """That updates were made of."""
    distinct_trajectories: int
    """Of those, the different ones: fewer than consumed means that one was trained on twice."""

    @property
    def balanced(self) -> bool:
        """Nothing vanished, nothing was trained on twice."""
        whole = self.generated == self.trained + self.wasted + self.in_flight
        return whole and self.consumed_trajectories == self.distinct_trajectories


class Calibration(Frozen):
    """What each role takes alone, on its own core, for one update's work: the mean over the very groups that the
    measured updates of a run train on; of weights, the median. The bounds are made of these."""

    generate_saturated_s: float
    """W_g / G: one update's groups by all generators while others are always in flight, no tail."""
    generate_batch_s: float
    """T_g: one update's groups from idle generators to the last token, tail included."""
    update_s: float
    """T_t."""
    snapshot_s: float
    push_s: float
    pull_s: float
    reload_s: float
    pause_s: float


class Bound(Frozen):
    """The shortest time of an update that the calibrated calls allow in this mode (`rl.bench.bound`)."""

    update_s: float
    formula: str
    """E.g. `max(W_g/G + T_p, T_t + T_snapshot)`."""


class WeightSync(Frozen):
    """Weights from the trainer's memory into the engine; medians over updates, in seconds."""

    num_bytes: int
    snapshot_s: float
    push_s: float
    pull_s: float
    reload_s: float
    pause_s: float
    exposed_s: float
    """Time of an update in which the trainer waited for weights: snapshot and wait for the last publication."""


class ControlPlane(Frozen):
    """What orchestration itself costs."""

    call_p50_s: float
    """Round trip of a call without work, from the loop to a hosted part."""
    call_p99_s: float
    messages_per_update: float
    """Requests and replies over the seam."""
    bytes_per_update: float
    overhead_s: float
    """Of an update: calls of the trainer beyond the time its own clock shows."""


class StartUp(Frozen):
    """From the start of the process."""

    open_s: float
    """Until the stack is open."""
    first_token_s: float
    """Until the first group of tokens came back."""
    first_update_s: float


class RoleUsage(Frozen):
    """One role's processes together."""

    role: Role
    peak_memory_bytes: int
    cpu_s: float
    """From the first measured update to the last."""


class RewardPoint(Frozen):
    """What one update was made of."""

    update: int
    wall_s: float
    """Since the first update began."""
    mean_reward: float
    correct_rate: float


class Span(Frozen):
    """Work of one role, for the timeline."""

    role: str
    """`trainer`, `generator 0`, ..."""
    kind: Literal["update", "publish", "generate", "load"]
    begin_s: float
    """Since the first measured update began."""
    end_s: float
    version: int


class CellRun(Frozen):
    """One measurement of a cell."""

    key: CellKey
    seed: int
    repeat: int
    order: int
    """Place in the sequence of all runs."""
    load_before: float
    """The machine's load average (1 min) when the run began."""
    error: str = ""
    """Why there are no numbers, where the run failed."""
    num_updates: int = 0
    """Measured, without warm-up."""
    update_s: tuple[float, ...] = ()
    """[updates] from the end of one update to the end of the next."""
    duration_s: float = 0.0
    """Of the measured updates together."""
    trajectories: int = 0
    """Fresh ones that the measured updates consumed."""
    trained_tokens: int = 0
    generated_tokens: int = 0
    num_cores: int = 2
    trainer_idle: float = 0.0
    generator_idle: float = 0.0
    overlap: float = 0.0
    """(busy trainer + busy generators - either) / the smaller."""
    staleness: tuple[int, ...] = ()
    """[groups] versions between the trainer's weights and the oldest that sampled the group."""
    versions_per_trajectory: float = 1.0
    wasted_share: float = 0.0
    """Wasted tokens of all that were generated."""
    accounting: Accounting | None = None
    bound: Bound | None = None
    weights: WeightSync | None = None
    fresh: Mismatch | None = None
    """Groups of staleness 0."""
    stale: Mismatch | None = None
    control: ControlPlane | None = None
    start_up: StartUp | None = None
    usage: tuple[RoleUsage, ...] = ()
    rewards: tuple[RewardPoint, ...] = ()
    timeline: tuple[Span, ...] = ()
    """Of the first few measured updates."""

    @property
    def efficiency(self) -> float | None:
        """The bound over what was measured: 1 is the best there is."""
        if self.bound is None or not self.num_updates or not self.duration_s:
            return None
        return self.bound.update_s / (self.duration_s / self.num_updates)


class CalibrationRun(Frozen):
    """The roles of one stack, each alone."""

    stack: str
    engine: str
    colocated: bool
    seed: int
    repeat: int
    calibration: Calibration | None = None
    error: str = ""


class Recovery(Frozen):
    """A role was killed (SIGKILL) while a run went on."""

    stack: str
    killed: Literal["trainer", "generator"]
    seed: int
    next_update_s: float
    """From the kill to the end of the next update that was new."""
    back_s: float
    """From the kill until the role was there again."""
    samples_lost: int
    """Groups asked for and neither trained on, nor dropped, nor filtered, nor kept; 0 unless work vanished."""
    samples_doubled: int
    """Groups trained on twice in the final ledger."""
    repeated_updates: int
    """Updates done again from the checkpoint."""
    error: str = ""


class Transport(Frozen):
    """Moving weights of one size from one process's memory into another's."""

    name: str
    """`memory_copy` (the limit), `shared_memory`, `ray_objects`, `ray_direct`, `monarch_rdma`, `monarch_message`,
    `ray_message`, `file`."""
    num_bytes: int
    seconds: tuple[float, ...]
    """[repeats] from the trainer's memory until the other process can read all of it."""
    copy_s: tuple[float, ...] = ()
    """[repeats] what the other process then needs to copy it into memory that nobody else writes to, as a generator
    does; 0 for `memory_copy`."""
    error: str = ""

    @property
    def gigabytes_per_s(self) -> float:
        """Of the median, in 10^9 bytes; 0 without a measurement."""
        return self.num_bytes / median(self.seconds) / 1e9 if self.seconds else 0.0


class Simulation(Frozen):
    """One point of a simulation or of a sweep, in virtual or emulated time."""

    placement: Placement
    stack: str
    """`loop` where no stack is hosted at all."""
    num_generators: int
    max_staleness: int
    policy: Literal["pace", "drop"]
    update_s: float
    """Mean, as the bound is."""
    bound_s: float
    wasted_share: float
    staleness_mean: float
    trainer_idle: float
    generator_idle: float


class Machine(Frozen):
    """Where it was measured."""

    processor: str
    num_cores: int
    memory_bytes: int
    system: str
    python: str
    versions: dict[str, str]
    """Of the packages that matter."""


class Results(Frozen):
    """Everything of one benchmark: `results.json`."""

    schema_version: int = SCHEMA_VERSION
    started_at: str
    """ISO 8601, UTC."""
    duration_s: float
    commit: str
    """Of this project; empty where it is not known."""
    quick: bool
    config: dict[str, object]
    """The `BenchConfig`, as JSON."""
    machine: Machine
    runs: tuple[CellRun, ...] = ()
    calibrations: tuple[CalibrationRun, ...] = ()
    recoveries: tuple[Recovery, ...] = ()
    transports: tuple[Transport, ...] = ()
    simulations: tuple[Simulation, ...] = ()

    @property
    def num_failed(self) -> int:
        """Measurements that have an error in the place of numbers."""
        errors = [one.error for one in self.runs] + [one.error for one in self.calibrations]
        errors += [one.error for one in self.recoveries] + [one.error for one in self.transports]
        return sum(map(bool, errors))
