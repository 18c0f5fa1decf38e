"""What flows through a run, in its order: Task -> Prompt -> Turn -> Trajectory -> Group -> Batch -> TrainMetrics.

Everything here is immutable, pickles, and turns into JSON and back without loss (`model_dump_json`,
`model_validate_json`), log-probabilities to the last bit. T is the number of tokens of a conversation, prompt included.
"""

import math
from functools import cached_property
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

TaskName = Literal["simple", "compositional", "multi_step", "recursive"]
Difficulty = Literal["easy", "medium", "hard"]
Operator = Literal["+", "-", "*"]

StopReason = Literal["answer", "no_tool_call", "max_turns", "max_tokens", "aborted"]
"""Why a conversation ended: it gave an answer; a turn had neither answer nor tool call; or it was cut."""

FailureMode = Literal["success", "wrong_format", "tool_spam", "wrong_answer", "truncated"]
"""How a conversation is judged (`rl.scoring.judge`)."""

UNSAMPLED = -1
"""The weight version of a token that no model sampled: prompt, tool result."""


class Frozen(BaseModel):
    """Base of every type that crosses a process boundary: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="constants")


class Task(Frozen):
    """One of the four tasks, with its degree of difficulty."""

    name: TaskName
    difficulty: Difficulty = "easy"
    """`compositional` only: two words added; two words and + - *; three words and + - *."""
    max_depth: int = Field(3, ge=1, le=3)
    """`recursive` only: the most redirects between a word and its value."""

    @model_validator(mode="after")
    def _settings_belong_to_the_task(self) -> Self:
        if self.difficulty != "easy" and self.name != "compositional":
            raise ValueError(f"task `{self.name}` has no difficulty, got `{self.difficulty}`")
        if self.max_depth != 3 and self.name != "recursive":
            raise ValueError(f"task `{self.name}` has no max_depth, got `{self.max_depth}`")
        return self

    @property
    def label(self) -> str:
        """A name for tables and ids: `simple`, `compositional/hard`, `recursive/2`."""
        if self.name == "compositional":
            return f"{self.name}/{self.difficulty}"
        return f"{self.name}/{self.max_depth}" if self.max_depth != 3 else self.name


class Prompt(Frozen):
    """One question about one table, e.g. `What is zorplex('cat') + zorplex('dog')?`."""

    task: Task
    table_seed: int = Field(ge=0)
    """The seed of the table that the tools look things up in."""
    number: int = Field(ge=0)
    """The place of the question in the stream of its table, from 0."""
    question: str
    words: tuple[str, ...]
    """The words that the question asks about, in its order."""
    operator: Operator | None = None
    answer: int

    @property
    def id(self) -> str:
        """The same question about the same table always has the same id, e.g. `simple:42:7`."""
        return f"{self.task.label}:{self.table_seed}:{self.number}"


class ToolCall(Frozen):
    """A tool call that a model wrote, `LOOKUP[cat]`, and what the tool said."""

    tool: str
    argument: str
    result: str


class Turn(Frozen):
    """What the model wrote in one go, and the tool calls in it."""

    text: str
    num_tokens: int = Field(ge=0)
    tool_calls: tuple[ToolCall, ...] = ()


class Trajectory(Frozen):
    """One conversation as it was sampled. The four sequences have the shape [T] and belong together."""

    prompt: Prompt
    group_id: str
    sample: int = Field(ge=0)
    """The place of this conversation in its group, from 0."""

    token_ids: tuple[int, ...]
    """[T] prompt, then what was sampled and what the tools said, as the engine saw it: text is never encoded anew."""
    loss_mask: tuple[bool, ...]
    """[T] True for a token that the model sampled, False for the prompt and for tool results."""
    logprobs: tuple[float, ...]
    """[T] natural log-probability of the token when it was sampled; 0 where the mask is False."""
    versions: tuple[int, ...]
    """[T] version of the weights that sampled the token; `UNSAMPLED` where the mask is False."""

    turns: tuple[Turn, ...]
    stop_reason: StopReason
    answer: int | None
    """The number behind the answer tag, None where there is no whole number behind one."""
    failure_mode: FailureMode
    reward: float
    num_discarded: int = Field(0, ge=0)
    """Tokens that the engine sampled behind the end of a turn; they are in no sequence here."""

    @model_validator(mode="after")
    def _shapes(self) -> Self:
        lengths = [len(self.token_ids), len(self.loss_mask), len(self.logprobs), len(self.versions)]
        if len(set(lengths)) != 1:
            raise ValueError(f"token_ids, loss_mask, logprobs and versions must be equally long, got {lengths}")
        sampled = [version != UNSAMPLED for version in self.versions]
        if sampled != list(self.loss_mask):
            raise ValueError("a token has a weight version if and only if the loss mask is True there")
        return self

    @property
    def num_tool_calls(self) -> int:
        """Tool calls that were executed."""
        return sum(len(turn.tool_calls) for turn in self.turns)

    @cached_property
    def num_sampled(self) -> int:
        """Tokens that a loss may train on."""
        return sum(self.loss_mask)

    @cached_property
    def oldest_version(self) -> int | None:
        """The oldest weights that sampled a token of this conversation, None where nothing was sampled."""
        return min((version for version in self.versions if version != UNSAMPLED), default=None)

    @cached_property
    def newest_version(self) -> int | None:
        """The newest weights that sampled a token of this conversation, None where nothing was sampled."""
        return max((version for version in self.versions if version != UNSAMPLED), default=None)


class Group(Frozen):
    """The samples of one prompt, which are each other's baseline."""

    id: str
    prompt: Prompt
    trajectories: tuple[Trajectory, ...] = Field(min_length=1)

    @property
    def rewards(self) -> tuple[float, ...]:
        """[number of samples] in the order of the samples."""
        return tuple(trajectory.reward for trajectory in self.trajectories)

    @property
    def informative(self) -> bool:
        """Whether the rewards differ; a group whose rewards are all equal has no advantage to learn from."""
        return len(set(self.rewards)) > 1

    @property
    def num_sampled(self) -> int:
        """Tokens that a loss may train on."""
        return sum(trajectory.num_sampled for trajectory in self.trajectories)

    @cached_property
    def oldest_version(self) -> int | None:
        """The oldest weights that sampled a token of this group."""
        found = (trajectory.oldest_version for trajectory in self.trajectories)
        return min((version for version in found if version is not None), default=None)


class Batch(Frozen):
    """The groups of one update."""

    update: int = Field(ge=0)
    """Number of the update that consumes this batch, from 0."""
    version: int = Field(ge=0)
    """Version of the trainer's weights when it takes the batch."""
    groups: tuple[Group, ...] = Field(min_length=1)

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        """All samples, group by group."""
        return tuple(trajectory for group in self.groups for trajectory in group.trajectories)

    @property
    def staleness(self) -> tuple[int, ...]:
        """[number of groups] versions between the trainer's weights and the oldest that sampled the group."""
        oldest = (group.oldest_version for group in self.groups)
        return tuple(0 if version is None else self.version - version for version in oldest)


class Mismatch(Frozen):
    """Trainer against sampler, over trained tokens of a kind; r is the importance weight of a token."""

    num_tokens: int
    k3_kl: float
    """Mean of r - 1 - log r, in nats."""
    effective_sample_size: float
    """(sum r)^2 / (n sum r^2)."""
    max_difference: float
    """Of log-probabilities, in nats."""


class TrainMetrics(Frozen):
    """What one update did. Shares are 0 to 1; divergences and entropy are in nats per trained token."""

    update: int
    version: int
    """Version of the weights that the update made."""
    loss: float
    gradient_norm: float
    """Before clipping."""
    learning_rate: float

    num_groups: int
    num_trajectories: int
    num_tokens: int
    """Tokens trained on."""
    mean_reward: float
    correct_rate: float
    """Share of trajectories with the right answer."""
    format_rate: float
    """Share of trajectories that gave an answer in the form asked for."""
    staleness_mean: float
    staleness_max: int

    effective_sample_size: float
    """(sum w)^2 / (n sum w^2) of the importance weights; 1 when the data is on-policy."""
    k3_kl: float
    """Estimate of KL(sampler || trainer)."""
    clip_fraction: float
    entropy: float
    reference_kl: float = 0.0
    """Estimate of KL(trainer || reference), 0 without a reference."""
    fresh: Mismatch | None = None
    """Over tokens of groups of staleness 0: what differs there is not the age of the weights. None without any."""
    stale: Mismatch | None = None
    """Over tokens of the other groups."""
    duration_s: float

    @property
    def finite(self) -> bool:
        """Whether the update is sound: loss and gradient are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)
