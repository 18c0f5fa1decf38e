"""What a benchmark is, as data. Light: imports no torch, ray, monarch or vllm."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rl.bench.results import Mode
from rl.emulation import EngineEmulation, LearnerEmulation
from rl.lengths import LengthTail
from rl.system_prompts import PromptStyle
from rl.types import Frozen, Task

BenchStack = Literal["local", "ray", "monarch", "hybrid"]
Part = Literal["matrix", "control", "sweep", "learning", "peers", "transports", "recovery", "simulation"]
"""`matrix`: every stack in every mode; `control`: engine `hf` on stack `local`; `sweep`: staleness on stack `local`;
`learning`: real conversations, for the reward; `peers`: other libraries; `transports`: weights alone; `recovery`: a
part is killed; `simulation`: sizes that this machine does not have. Where accelerators are emulated, `control`,
`learning`, `peers` and `recovery` have nothing to say and are left out."""
ALL_PARTS: tuple[Part, ...] = (
    "matrix", "control", "sweep", "learning", "peers", "transports", "recovery", "simulation",
)  # fmt: skip
ALL_MODES: tuple[Mode, ...] = ("sync-colocated", "sync", "one-step", "async")

_EMULATED_GENERATORS, _GROUPS_PER_GENERATOR = 4, 4


class BenchConfig(Frozen):
    """One benchmark."""

    stacks: Annotated[list[BenchStack], Field(min_length=1)] = ["local", "ray", "monarch", "hybrid"]
    """What hosts trainer and generators."""
    modes: Annotated[list[Mode], Field(min_length=1)] = list(ALL_MODES)
    """How the two take turns, or do not."""
    parts: Annotated[list[Part], Field(min_length=1)] = list(ALL_PARTS)
    """What is measured; where there are cells, what their bounds are made of as well."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0, 1, 2]
    """Every seed runs through all cells; it is the seed of the prompts, the sampling, the lengths and `tiny`."""
    repeats: Annotated[int, Field(ge=1)] = 1
    """Times that every seed runs through all cells."""
    updates: Annotated[int, Field(ge=1)] = 20
    """Measured updates of a run."""
    warmup_updates: Annotated[int, Field(ge=1)] = 4
    """Updates before those, which are in no number but the start-up and the rewards."""
    learning_updates: Annotated[int, Field(ge=1)] = 60
    """Measured updates of a run of the part `learning`."""

    model: str = "tiny"
    """`tiny`, `smollm2`, a folder, or an id of the Hugging Face hub."""
    task: Task = Task(name="simple")
    """Asks the questions of both workloads."""
    groups_per_update: Annotated[int, Field(ge=1)] = 4
    """Prompts of one update."""
    group_size: Annotated[int, Field(ge=1)] = 8
    """Samples of one prompt."""
    groups_in_flight: Annotated[int, Field(ge=1)] = 8
    """Most groups that the generators sample at a time, each of them."""
    num_generators: Annotated[int, Field(ge=1)] = 1
    """Engines that sample at once."""
    lengths: LengthTail = LengthTail()
    """Of the samples of the workload `tail`."""
    max_tokens: Annotated[int, Field(ge=16)] = 320
    """Of a whole conversation, prompt included."""
    max_tokens_per_turn: Annotated[int, Field(ge=1)] = 32
    """Of the workload `task`."""
    prompt_style: PromptStyle = "brief"
    """What `tiny` knows; other models want `guided`, and more `max_tokens`."""
    cache_gb: Annotated[float, Field(gt=0)] = 0.25
    """Memory of an engine for keys and values."""
    staleness: Annotated[int, Field(ge=2)] = 4
    """`max_staleness` of the mode `async`."""
    stale_policy: Literal["pace", "drop"] = "pace"
    """Wait before a group would become too stale, or sample ahead and drop what did."""
    colocated_engine_threads: Annotated[int, Field(ge=1)] = 1
    """Threads of an engine in the mode `sync-colocated`, and of TRL's sampling, which have all cores; the trainer has
    one for each core. A baseline must be as fast as it can be: with two threads `tiny` samples at half the speed,
    because they wait for each other longer than they compute. A larger model wants as many as there are cores."""
    sweep: list[Annotated[int, Field(ge=0)]] = [0, 1, 2, 4]
    """`max_staleness` of the cells of the part `sweep`."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """Of AdamW."""
    cores: list[Annotated[int, Field(ge=0)]] | None = None
    """The trainer has the first, the generators the others; by default the first two that this process may use, or one
    more for each further generator."""

    cell_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """A run that takes longer is ended, and counts as failed."""
    emulate_accelerators: bool = False
    """Measure orchestration instead of compute: real processes, messages and weights, device time slept. There are then
    4 generators by default, and 4 groups in an update for each of them."""
    emulated_engine: EngineEmulation = EngineEmulation()
    """The devices of the generators, where accelerators are emulated."""
    emulated_learner: LearnerEmulation = LearnerEmulation()
    """The device of the trainer, where accelerators are emulated, and the size of the weights."""
    quick: bool = False
    """The numbers are from a short run, and say little about the machine; the part `learning` is on the first stack
    alone."""

    @model_validator(mode="before")
    @classmethod
    def _more_generators_where_devices_sleep(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not given.get("emulate_accelerators"):
            return given
        generators = given.get("num_generators", _EMULATED_GENERATORS)
        return {"num_generators": generators, "groups_per_update": _GROUPS_PER_GENERATOR * generators, **given}

    @classmethod
    def short(cls) -> Self:
        """What `--quick` is: two stacks, two modes, and a little of the rest, in five minutes on two cores."""
        return cls(
            quick=True,
            stacks=["local", "ray"],
            modes=["sync", "async"],
            parts=["matrix", "learning", "transports", "simulation"],
            seeds=[0],
            groups_per_update=2,
            updates=6,
            warmup_updates=2,
            learning_updates=10,
            cell_timeout_s=300.0,
        )
