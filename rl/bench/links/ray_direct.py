"""The ends of Ray direct transport: Ray sends tensors from process to process by itself, here by gloo.

    DirectSender.weights -> reference -> DirectReceiver.take      the tensors go from the one's memory to the other's

The sender's method returns tensors that stay where they are until they are wanted, so they are copied aside first: the
trainer goes on.
"""

import time
from collections.abc import Mapping

import ray
from torch import Tensor

from rl.bench.links.ends import Arrival, check, copy, fill, new_state


class DirectSender:
    """The trainer's end of `ray_direct`."""

    def open(self, num_bytes: int) -> None:
        """Make the weights and the place they are copied to."""
        self._state, self._aside = new_state(num_bytes), new_state(num_bytes)
        self._began_s = 0.0

    def prepare(self, version: int) -> None:
        """An update happened."""
        fill(self._state, version)

    @ray.method(tensor_transport="gloo")  # type: ignore[untyped-decorator]
    def weights(self) -> list[Tensor]:
        """Tensors that Ray sends when they are wanted."""
        self._began_s = time.perf_counter()
        copy(self._state, self._aside)
        return list(self._aside.values())

    def began_s(self) -> float:
        """When the last call of `weights` began."""
        return self._began_s

    def close(self) -> None:
        """Free the memory."""
        self._state, self._aside = {}, {}


class DirectReceiver:
    """The other process's end of `ray_direct`."""

    def open(self, num_bytes: int) -> None:
        """Make room."""
        self._own: Mapping[str, Tensor] = new_state(num_bytes)

    def take(self, tensors: list[Tensor], version: int) -> Arrival:
        """They are here when this is called."""
        at_s = time.perf_counter()
        copy_s = copy(dict(zip(self._own, tensors, strict=True)), self._own)
        check(self._own, version)
        return Arrival(at_s=at_s, copy_s=copy_s)

    def close(self) -> None:
        """Free the memory."""
        self._own = {}
