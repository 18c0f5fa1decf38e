"""Chooses where a step runs: beside the worker, or on a Ray node when it asks for resources or an image."""

import asyncio
from collections.abc import Callable

from pydantic import ByteSize, TypeAdapter

from bridge.calls import StepCall
from bridge.current_cluster import chosen_cluster
from bridge.dispatch import Dispatch, LocalDispatch
from bridge.plan import Resources
from bridge.services import RayUnusable, start_ray
from bridge.state import State
from cluster.dispatch import ClusterUnusable, RayDispatch, RayHandle, RayLocation
from cluster.shape import ResourceShape
from steps import Progress, StepRequest, StepResult
from steps._registry import step_types

_BYTES = TypeAdapter(ByteSize)


class Placement:
    """The dispatches of one worker. Ray is started or found when the first step needs it."""

    def __init__(self, local: LocalDispatch, state: State) -> None:
        self._local = local
        self._state = state
        self._rays: dict[str, RayDispatch] = {}
        """By the address of the cluster; empty for the local Ray. Steps stay with the cluster they began on."""

    def choose(self, call: StepCall) -> Dispatch:
        """Where a call runs."""
        if call.resources is None and not call.image:
            return self._local
        step_type = step_types().get(call.request.type)
        with_engine = step_type is not None and step_type.drives_engine
        return self.on_ray(shape(call.resources, call.image), with_engine=with_engine)

    def on_ray(self, wanted: ResourceShape, *, with_engine: bool = False) -> Dispatch:
        """Ray nodes that have what is wanted; `with_engine`: those that drive a container engine too."""
        cluster = address, _ = chosen_cluster(self._state, with_engine=with_engine)
        if address not in self._rays:
            self._rays[address] = ray_dispatch(self._state, cluster)
        return OnRay(self._rays[address], wanted)

    async def close(self) -> None:
        """Let go of everything; running steps stay."""
        self._local.close()
        await asyncio.gather(*(ray.close() for ray in self._rays.values()))


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


def ray_dispatch(state: State, cluster: tuple[str, str] | None = None) -> RayDispatch:
    """Steps on `cluster`, by default the one that is chosen now, else on the local Ray, started when first needed."""
    address, token_file = chosen_cluster(state) if cluster is None else cluster

    async def locate() -> RayLocation:
        if address:
            return RayLocation(address=address, token_file=token_file)
        try:
            ray = await asyncio.to_thread(start_ray, state)
        except RayUnusable as error:
            raise ClusterUnusable(str(error)) from error
        return RayLocation(address=ray.address, token_file=str(ray.token_file))

    return RayDispatch(locate, driver_log=state.log_file("ray-driver"))


def shape(resources: Resources | None, image: str) -> ResourceShape:
    """What a plan's `resources` and `image` mean for Ray; a step that names no cpus gets one core."""
    wanted = resources or Resources()
    return ResourceShape(
        nodes=int(float(wanted.nodes or 0)),
        cpus=1.0 if wanted.cpus is None else float(wanted.cpus),
        gpus=float(wanted.gpus or 0),
        memory=int(_BYTES.validate_python(wanted.memory or 0)),
        labels=wanted.labels,
        custom={name: float(amount) for name, amount in wanted.custom.items()},
        image=image,
        actor=wanted.actor or "",
    )
