"""A generator as every stack hosts it: an engine, the conversations on it, and its end of the weight store.

    generate: GroupRequest -> rollouts -> Group        load: store -> this process -> engine -> parity -> Loaded

Nothing heavy is imported before `open`.
"""

import asyncio
import math
import os
import time
from typing import TYPE_CHECKING, Any

from rl.config import RunConfig
from rl.generate import Generate
from rl.stack import GroupRequest, Loaded, PartLost
from rl.types import Group, Trajectory

if TYPE_CHECKING:
    from rl.engine import Engine
    from rl.weights import WeightReader, WeightStoreHandle

_MOST_PULLS = 5
"""A pull that is overtaken by the trainer is tried again so often."""


class GeneratorHost:
    """One generator in this process. Used from one event loop; a stack calls it from wherever it likes."""

    def __init__(
        self, config: RunConfig, number: int, model_folder: str, weights: "WeightStoreHandle | None" = None
    ) -> None:
        self._config = config
        self._number = number
        self._model_folder = model_folder
        self._handle = weights
        self._engine: Engine
        self._reader: WeightReader | None = None
        self._own: dict[str, Any] = {}
        """The last weights that were pulled, out of the trainer's reach."""
        self._one_load = asyncio.Lock()
        self._one_group = asyncio.Lock()

    async def open(self, version: int = 0) -> None:
        """Start the engine with the model's own weights, which are version 0, and load those of `version`.

        Without a weight store, the model's own weights count as `version`.
        """
        from rl.engine import open_engine
        from rl.models import load_tokenizer
        from rl.weights import open_reader

        self._tokenizer = await asyncio.to_thread(load_tokenizer, self._model_folder)
        self._engine = await open_engine(
            self._config.engine,
            self._model_folder,
            self._tokenizer,
            version=version if self._handle is None else 0,
            gpus=self._config.generator_gpus,
            number=self._number,
        )
        if self._handle is not None:
            self._reader = open_reader(self._handle)
            if version > 0:
                await self.load(version)

    async def generate(self, request: GroupRequest) -> Group:
        """The finished group. Raises `PartLost` when the engine has broken down."""
        from rl.engine import EngineClosed

        try:
            if not self._config.engine.reproducible:
                return await self._group(request)
            async with self._one_group:
                return await self._group_in_step(request)
        except EngineClosed as closed:
            raise PartLost(f"generator {self._number}: {closed}") from closed

    async def load(self, version: int) -> Loaded:
        """Go on with weights at least as new as `version`. Raises `ParityError`, `WeightsMissing`, `WeightsLost`,
        `PartLost`."""
        from rl.engine import EngineClosed
        from rl.parity import check_parity

        async with self._one_load:
            started = time.perf_counter()
            header, num_bytes = await self._pull(version)
            pull_s = time.perf_counter() - started
            try:
                swapped = await self._engine.swap(self._own, header.version)
                parity = math.nan
                if self._config.engine.emulation is None:
                    limit = self._config.engine.parity_limit
                    parity = await check_parity(self._engine, header, self._tokenizer, limit)
            except EngineClosed as closed:
                raise PartLost(f"generator {self._number}: {closed}") from closed
        return Loaded(
            version=header.version,
            num_bytes=num_bytes,
            pull_s=pull_s,
            reload_s=swapped.reload_s,
            pause_s=swapped.pause_s,
            parity=parity,
        )

    async def ping(self) -> int:
        """Nothing but the number of this process."""
        return os.getpid()

    async def close(self) -> None:
        """End the engine and leave the store, as far as they were opened."""
        if hasattr(self, "_engine"):
            await self._engine.close()
        if self._reader is not None:
            self._reader.close()

    async def _pull(self, version: int) -> tuple[Any, int]:
        """The newest weights in `self._own`; their header and size."""
        from rl.weights import TornRead

        assert self._reader is not None, "weights are loaded from a store, and there is none"
        for attempt in range(_MOST_PULLS):
            try:
                pulled = await self._reader.pull(version)
                await asyncio.to_thread(self._copy, pulled.tensors)
                pulled.check()
            except TornRead:
                if attempt + 1 == _MOST_PULLS:
                    raise
            else:
                return pulled.header, pulled.num_bytes
        raise AssertionError("the loop ends by return or raise")

    def _copy(self, tensors: Any) -> None:
        """What the engine reads must not change under it."""
        if not self._own:
            self._own = {name: tensor.clone() for name, tensor in tensors.items()}
            return
        for name, tensor in tensors.items():
            self._own[name].copy_(tensor)

    async def _group(self, request: GroupRequest) -> Group:
        from rl.rollout import rollout_group

        return await rollout_group(
            self._engine,
            self._tokenizer,
            request.prompt,
            request.settings,
            group_id=request.group_id,
            group_size=request.group_size,
            seed=request.seed,
        )

    async def _group_in_step(self, request: GroupRequest) -> Group:
        from rl.rollout import rollout
        from rl.turn_barrier import TurnBarrier

        async def conversation(number: int, generate: Generate) -> Trajectory:
            return await rollout(
                generate,
                self._tokenizer,
                request.prompt,
                request.settings,
                group_id=request.group_id,
                sample=number,
                seed=request.seed,
            )

        trajectories = await TurnBarrier(self._engine, request.group_size).run(conversation)
        return Group(id=request.group_id, prompt=request.prompt, trajectories=tuple(trajectories))
