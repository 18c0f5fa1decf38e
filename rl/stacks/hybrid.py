"""The trainer under Monarch, the generators in actors of Ray: composition only.

loop -> trainer under Monarch -> store (shared memory, or files) -> generators in Ray
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rl.config import RunConfig
from rl.hosting import model_folder, weight_store
from rl.ray_cluster import connected, is_one_host
from rl.stacks.composed import ComposedStack
from rl.stacks.monarch import open_trainers
from rl.stacks.ray import RayGenerators


@asynccontextmanager
async def open_stack(config: RunConfig, folder: str = "") -> AsyncIterator[ComposedStack]:
    """A trainer in a process of this host, and generators on the cluster that `rl.ray_cluster` finds or begins."""
    if config.transport in ("ray_objects", "monarch_rdma"):
        raise ValueError(
            f"`transport` is `{config.transport}`, which one half of stack `hybrid` cannot reach\n\n"
            "hint: `shared_memory` on one host; `file`, and TMPDIR in a folder that all machines see, on several"
        )
    with connected(config.num_generators * config.generator_gpus):
        together = is_one_host()
        if not together and config.transport != "file":
            raise ValueError(
                "the Ray cluster has other machines than this one, wanted `transport` `file`\n\n"
                "hint: set TMPDIR to a folder that all machines see"
            )
        from rl.services_monarch import faults_are_data

        model = await asyncio.to_thread(model_folder, config)
        with faults_are_data(), weight_store(config.transport or "shared_memory") as weights:
            # On other machines each generator finds the model by its name.
            generators = RayGenerators(config, model if together else "", weights)
            async with open_trainers(config, model, weights, folder) as trainers:
                try:
                    await generators.open()
                    yield ComposedStack(trainers, generators)
                finally:
                    await generators.close()
