"""The seam between the loop and whoever hosts its parts: a trainer, generators, and what they say.

    loop --GroupRequest--> Generator --Group--> loop --Batch--> Trainer --TrainMetrics--> loop
         --version-------> Generator (pulls)                    Trainer --version-------> loop

The loop passes prompts, groups and version numbers; weights go from trainer to generators by the stack's own way
(`rl.weights`). A stack is hosting only: the same learner and the same engine run in plain processes, in actors of Ray
or in those of Monarch. Light: imports no torch, ray, monarch or vllm.
"""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from pydantic import Field

from rl.rollout import RolloutSettings
from rl.types import Batch, Frozen, Group, Prompt, TrainMetrics

if TYPE_CHECKING:
    from rl.config import RunConfig


class GroupRequest(Frozen):
    """One prompt to be sampled `group_size` times."""

    group_id: str
    prompt: Prompt
    group_size: int = Field(ge=1)
    seed: int
    settings: RolloutSettings


class Published(Frozen):
    """What one publication of the trainer's weights cost."""

    version: int
    num_bytes: int
    snapshot_s: float
    """Copying the weights aside, during which the trainer waits."""
    push_s: float
    """Making the copy readable for generators, off the trainer's critical path."""


class Loaded(Frozen):
    """What one generator's change to new weights cost."""

    version: int
    num_bytes: int
    pull_s: float
    """From the store into this process."""
    reload_s: float
    """Into the engine, between two of its steps."""
    pause_s: float
    """The longest time in which the engine sampled no token because of it."""
    parity: float
    """Largest difference of log-probabilities between trainer and engine on a fresh sample; in nats. Not a number where
    there is nothing to compare: emulated parts have no model."""


class PartLost(Exception):
    """The process behind a generator or the trainer is gone. The argument says which and how."""


class WeightsLost(Exception):
    """Weights that were published went with the trainer that published them. The argument says which."""


class ParityError(Exception):
    """Trainer and engine do not agree on what the weights say, so the run must stop. The argument is a report."""


class Generator(Protocol):
    """Samples whole groups, many at a time."""

    async def generate(self, request: GroupRequest) -> Group:
        """The finished group. Raises `PartLost`."""
        ...

    async def load(self, version: int) -> Loaded:
        """Go on with the weights of `version`; running requests are kept.

        Raises `PartLost`, `WeightsLost` and `ParityError`.
        """
        ...


class Trainer(Protocol):
    """Owns the weights."""

    async def update(self, batch: Batch) -> TrainMetrics:
        """One optimizer step; the weights are then of version `batch.version + 1`. Raises `PartLost`."""
        ...

    async def publish(self) -> Published:
        """Let generators load the weights as they are now, as the newest. Raises `PartLost`.

        The loop calls the next `update` while this goes on, so the weights are copied aside before that begins. After
        a trainer was restored the version may be lower than one that was published before.
        """
        ...

    async def save(self, folder: str) -> None:
        """Model, optimizer and random state as files in `folder`, which exists. Raises `PartLost`."""
        ...


class Stack(Protocol):
    """The open parts of one run."""

    @property
    def trainer(self) -> Trainer:
        """The trainer that lives now."""
        ...

    @property
    def generators(self) -> Sequence[Generator]:
        """The generators that live now; a place keeps its number when its generator is replaced."""
        ...

    async def replace_generator(self, number: int, version: int) -> None:
        """Start another in the place of one that is lost, with the weights of `version`. Raises `WeightsLost`."""
        ...

    async def replace_trainer(self, folder: str) -> None:
        """Start another in the place of one that is lost, from the files of `Trainer.save`."""
        ...


def open_stack(config: "RunConfig", folder: str = "") -> AbstractAsyncContextManager[Stack]:
    """The stack that `config.stack` names, with its trainer restored from `folder` where one is given."""
    opened: AbstractAsyncContextManager[Stack] = import_module(f"rl.stacks.{config.stack}").open_stack(config, folder)
    return opened
