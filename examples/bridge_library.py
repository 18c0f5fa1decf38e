"""Ray calls from a Temporal workflow of your own: python examples/bridge_library.py

A call is an ordinary activity for the workflow. It runs on an actor of the Ray cluster, is found again when this worker
dies, and keeps its logs like a plan's step. Without TEMPORAL_ADDRESS and RAY_ADDRESS the local services are used.
"""

import asyncio
import os
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

from temporalio import workflow
from temporalio.client import Client
from temporalio.worker import Worker

with workflow.unsafe.imports_passed_through():
    from bridge.plugin import RayCall, RayPlugin, ResourceShape, run_on_ray
    from bridge.services import ensure
    from bridge.state import State

HERE = str(Path(__file__).parent.absolute())


@workflow.defn
class FairDice:
    """Throws dice on Ray, all at once, and compares their means."""

    @workflow.run
    async def run(self, sides: list[int]) -> list[float]:
        throws = await asyncio.gather(
            *(self._on_ray("dice:roll", {"seed": 1, "sides": count, "times": 1000}) for count in sides)
        )
        means = [throw["mean"] for throw in throws]
        compared = await self._on_ray("dice:compare", {"means": means, "sides": sides})
        return list(compared["bias"])

    async def _on_ray(self, function: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return await workflow.execute_activity(
            run_on_ray,
            # `plan_dir` is the folder whose modules can be called; `image` would name a container.
            RayCall(function=function, arguments=arguments, resources=ResourceShape(cpus=1), plan_dir=HERE),
            start_to_close_timeout=timedelta(minutes=10),
            heartbeat_timeout=timedelta(seconds=10),
        )


async def main() -> None:
    """Run the workflow once, with a worker in this process."""
    address = os.environ.get("TEMPORAL_ADDRESS") or ensure(State.from_environment().create()).address
    client = await Client.connect(address, plugins=[RayPlugin()])
    async with Worker(client, task_queue="fair-dice", workflows=[FairDice]):
        bias = await client.execute_workflow(
            FairDice.run, [4, 6, 20], id=f"fair-dice-{uuid.uuid4()}", task_queue="fair-dice"
        )
    print(f"bias of the dice: {bias}")


if __name__ == "__main__":
    asyncio.run(main())
