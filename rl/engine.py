"""The engine behind a generator: many turns sampled at once, weights changed between two steps.

    Generate requests --+                        +--> Samples, each token with the version of the weights it came from
    swap, score --------+--> EngineThread: one   +--> log-probabilities of given tokens
                             thread that owns a Driver (vLLM or Hugging Face)

Light until an engine is opened.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from pydantic import Field

from rl.config import EngineConfig
from rl.generate import GenerateRequest, Sample
from rl.pinning import pin
from rl.tokenizer import Tokenizer
from rl.types import Frozen

if TYPE_CHECKING:
    import torch


class Swapped(Frozen):
    """What one change of weights cost."""

    reload_s: float
    """Time that the engine's thread spent on it."""
    pause_s: float
    """The part of it in which requests waited for their next token: all of it, or 0 when there was none."""


class ScoreRequest(Frozen):
    """Tokens whose log-probabilities are wanted."""

    token_ids: tuple[int, ...] = Field(min_length=2)
    """[T]"""


class Engine(Protocol):
    """Samples turns; itself a `Generate`. Used from one event loop."""

    @property
    def version(self) -> int:
        """Of the weights that the next token comes from."""
        ...

    async def __call__(self, request: GenerateRequest) -> Sample:
        """One turn. A task that is cancelled takes its request out of the engine.

        Raises ValueError for a request that the engine cannot take, EngineClosed when the engine has broken down.
        """
        ...

    async def submit(self, requests: Sequence[GenerateRequest]) -> list[Sample]:
        """Several turns that begin in one step, each after the other in the engine's batch."""
        ...

    async def score(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """[T - 1] natural log-probabilities of `token_ids[1:]`, each given those before it, at temperature 1."""
        ...

    async def swap(self, tensors: "Mapping[str, torch.Tensor]", version: int) -> Swapped:
        """Go on with other weights from the next step on: all tensors of the model, by their checkpoint's names.

        The tensors are copied before this returns. Running requests are kept (`EngineConfig.kv_policy`).
        """
        ...

    async def close(self) -> None:
        """End the thread. Requests that still run are answered with what they have, and finish `abort`."""
        ...


class EngineClosed(Exception):
    """The engine's thread has ended; the cause is chained where there is one."""


async def open_engine(
    config: EngineConfig,
    model_folder: str,
    tokenizer: Tokenizer,
    *,
    version: int = 0,
    gpus: float = 0,
    number: int = 0,
) -> Engine:
    """An engine with the weights of a model folder, which count as `version`; `number` is its generator's."""
    if config.emulation is not None:
        from rl.engine_emulated import EmulatedEngine

        return EmulatedEngine(config, config.emulation, tokenizer, version)
    from rl.engine_thread import Deliver, Driver, EngineThread

    def driver(deliver: Deliver) -> Driver:
        # In the engine's own thread, before it starts others.
        pin(config.cores[number % len(config.cores)] if config.cores else None)
        if not gpus:
            import torch

            # Whoever else computes in this process may have other plans.
            torch.set_num_threads(config.num_threads)
        if config.name == "hf":
            from rl.engine_hf import HfDriver

            return HfDriver(config, model_folder, tokenizer, deliver, version=version, gpus=gpus)
        from rl.engine_vllm import VllmDriver

        return VllmDriver(config, model_folder, tokenizer, deliver, version=version, gpus=gpus)

    return await EngineThread.open(driver, f"engine-{config.name}")
