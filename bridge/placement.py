"""Chooses where a step runs: beside the worker, or on a Ray node when it asks for resources or an image."""

import asyncio
import os
from collections.abc import Callable

from pydantic import ByteSize, TypeAdapter

from bridge.calls import StepCall
from bridge.dispatch import Dispatch, LocalDispatch
from bridge.plan import Resources
from bridge.services import start_ray
from bridge.state import State
from cluster.dispatch import RayDispatch, RayHandle, RayLocation
from cluster.shape import ResourceShape
from steps import Progress, StepRequest, StepResult

_BYTES = TypeAdapter(ByteSize)


class Placement:
    """The dispatches of one worker. Ray is started or found when the first step needs it."""

    def __init__(self, local: LocalDispatch, state: State) -> None:
        self._local = local
        self._state = state
        self._ray: RayDispatch | None = None

    def choose(self, call: StepCall) -> Dispatch:
        """Where a call runs."""
        if call.resources is None and not call.image:
            return self._local
        return self.on_ray(shape(call.resources, call.image))

    def on_ray(self, wanted: ResourceShape) -> Dispatch:
        """Ray nodes that have what is wanted."""
        if self._ray is None:
            self._ray = ray_dispatch(self._state)
        return OnRay(self._ray, wanted)

    async def close(self) -> None:
        """Let go of everything; running steps stay."""
        self._local.close()
        if self._ray is not None:
            await self._ray.close()


class OnRay:
    """The dispatch of steps of one shape."""

    def __init__(self, ray: RayDispatch, wanted: ResourceShape) -> None:
        self._ray = ray
        self._wanted = wanted

    async def attach_or_start(self, request: StepRequest) -> "_RayHandle":
        return _RayHandle(await self._ray.attach_or_start(request, self._wanted))


class _RayHandle:
    def __init__(self, handle: RayHandle) -> None:
        self._handle = handle

    async def wait(self, on_progress: Callable[[Progress], None]) -> StepResult:
        return await self._handle.wait(on_progress)

    async def cancel(self) -> StepResult:
        await self._handle.cancel()
        return await self._handle.wait()


def ray_dispatch(state: State) -> RayDispatch:
    """Steps on the cluster that `RAY_ADDRESS` names, else on the local Ray, which is started when first needed."""

    async def locate() -> RayLocation:
        if address := os.environ.get("RAY_ADDRESS"):
            return RayLocation(address=address, token_file=os.environ.get("RAY_AUTH_TOKEN_PATH", ""))
        ray = await asyncio.to_thread(start_ray, state)
        return RayLocation(address=ray.address, token_file=str(ray.token_file))

    return RayDispatch(locate, driver_log=state.log_file("ray-driver"))


def shape(resources: Resources | None, image: str) -> ResourceShape:
    """What a plan's `resources` and `image` mean for Ray; a step that names no cpus gets one core."""
    wanted = resources or Resources()
    return ResourceShape(
        cpus=1.0 if wanted.cpus is None else float(wanted.cpus),
        gpus=float(wanted.gpus or 0),
        memory=int(_BYTES.validate_python(wanted.memory or 0)),
        labels=wanted.labels,
        custom={name: float(amount) for name, amount in wanted.custom.items()},
        image=image,
    )
