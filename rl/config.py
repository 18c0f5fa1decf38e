"""What a training run is, as data. Light: imports no torch, ray, monarch or vllm."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rl.emulation import EngineEmulation, LearnerEmulation
from rl.loss_settings import LossSettings
from rl.rollout import RolloutSettings
from rl.types import Frozen, Task

StackName = Literal["local", "ray", "monarch", "hybrid", "scripted"]
EngineName = Literal["vllm", "hf"]
"""Engines that have a model."""
TransportName = Literal["shared_memory", "ray_objects", "monarch_rdma", "file"]
Cores = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
"""Numbers of a machine's cores."""


class EngineConfig(Frozen):
    """What samples."""

    name: EngineName | Literal["emulated"] = "vllm"
    kv_policy: Literal["keep", "recompute"] = "keep"
    """What running requests do with keys and values of older weights."""
    max_model_tokens: Annotated[int, Field(ge=16)] = 2048
    """The longest conversation the engine takes."""
    cache_gb: Annotated[float, Field(gt=0)] = 1.0
    """Memory for keys and values."""
    num_threads: Annotated[int, Field(ge=1)] = 1
    cores: list[Cores] | None = None
    """Cores that the generators compute on: generator n takes the entry n, and they begin again behind the last; by
    default none is pinned."""
    reproducible: bool = False
    """Sample one group at a time, turn by turn, so that the same group by the same weights is the same to the bit,
    whatever else is sampled; slower."""
    parity_limit: Annotated[float, Field(gt=0)] = 1e-4
    """Largest difference of log-probabilities, in nats, between trainer and engine after a change of weights (fp32)."""
    emulation: EngineEmulation | None = None
    """For measurements, with the engine `emulated`: how long a device would take, which is slept."""

    @model_validator(mode="after")
    def _emulated_as_a_whole(self) -> Self:
        if (self.name == "emulated") != (self.emulation is not None):
            raise ValueError("the engine `emulated` and the setting `engine.emulation` belong together")
        return self


class LearnerConfig(Frozen):
    """What learns."""

    loss: LossSettings = LossSettings()
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_gradient_norm: Annotated[float, Field(gt=0)] = 1.0
    micro_batch_tokens: Annotated[int, Field(ge=16)] = 8192
    """Padded tokens of one forward pass."""
    num_processes: Annotated[int, Field(ge=1)] = 1
    """Data-parallel processes."""
    num_threads: Annotated[int, Field(ge=1)] = 1
    cores: Cores | None = None
    """Cores that all processes of the learner compute on; by default none is pinned."""
    fully_sharded: bool = False
    """FSDP2, for models that one process cannot hold."""
    emulation: LearnerEmulation | None = None
    """For measurements, with the engine `emulated`: how long a device would take, which is slept."""


class RunConfig(Frozen):
    """One training run."""

    stack: StackName = "local"
    """What hosts trainer and generators."""
    model: str = "tiny"
    """`tiny`, `smollm2`, a folder, or an id of the Hugging Face hub."""
    tasks: Annotated[list[Task], Field(min_length=1)] = [Task(name="simple")]
    """What is learned; the tasks take turns."""
    updates: Annotated[int, Field(ge=1)] = 100
    """Optimizer steps in all."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the prompts, the sampling, and the model `tiny`."""

    groups_per_update: Annotated[int, Field(ge=1)] = 8
    """Prompts of one update."""
    group_size: Annotated[int, Field(ge=1)] = 8
    """Conversations about one prompt, which are each other's baseline."""
    max_staleness: Annotated[int, Field(ge=0)] = 2
    """Versions that the weights may advance while a group is sampled and waits; 0 is synchronous."""
    stale_policy: Literal["pace", "drop"] = "pace"
    """Wait before a group would become too stale, or sample ahead and drop what did."""
    filter_zero_variance: bool = True
    """Leave out groups whose rewards are all equal, and sample others in their place."""
    rollout: RolloutSettings = RolloutSettings()
    """Where the model is `tiny`, `prompt_style` is `brief` by default: it was made on such prompts."""

    engine: EngineConfig = EngineConfig()
    """What samples the conversations."""
    learner: LearnerConfig = LearnerConfig()
    """What learns from them."""
    num_generators: Annotated[int, Field(ge=1)] = 1
    """Engines that sample at once."""
    groups_in_flight: Annotated[int, Field(ge=1)] = 8
    """Most groups that one generator samples at a time."""
    transport: TransportName | None = None
    """How weights travel; by default what suits the stack."""
    generator_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of each generator."""
    trainer_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of the trainer, one for each of its processes."""

    checkpoint_every: Annotated[int, Field(ge=1)] = 20
    """Updates between checkpoints."""
    evaluate_every: Annotated[int, Field(ge=0)] = 0
    """Updates between evaluations on held-out prompts; 0 evaluates at the end alone."""
    evaluation_prompts: Annotated[int, Field(ge=1)] = 100
    """Held-out prompts of one evaluation."""
    stuck_after_s: Annotated[float, Field(gt=0)] = 300.0
    """A phase that takes longer is reported by the watchdog, with the stacks of the processes concerned."""

    @model_validator(mode="before")
    @classmethod
    def _brief_for_tiny(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("model", "tiny") != "tiny":
            return given
        rollout = given.get("rollout", {})
        if not isinstance(rollout, dict):
            return given
        return {**given, "rollout": {"prompt_style": "brief", **rollout}}

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if self.rollout.max_tokens > self.engine.max_model_tokens:
            raise ValueError(
                f"`rollout.max_tokens` is {self.rollout.max_tokens}, more than the {self.engine.max_model_tokens} "
                "of `engine.max_model_tokens`"
            )
        return self

    @model_validator(mode="after")
    def _emulated_on_both_sides(self) -> Self:
        if (self.engine.emulation is None) != (self.learner.emulation is None):
            raise ValueError(
                "`engine.emulation` and `learner.emulation` belong together: neither a model nor an engine can do "
                "anything with the other's emulation"
            )
        return self

    @model_validator(mode="after")
    def _learner_can_be_hosted(self) -> Self:
        processes = self.learner.num_processes
        if 0 < self.trainer_gpus < processes:
            raise ValueError(
                f"`trainer_gpus` is {self.trainer_gpus:g}, fewer than the {processes} processes of `learner`"
            )
        return self
