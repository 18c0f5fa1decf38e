"""What the processes of a learner add up together: gloo on CPUs, nccl on GPUs, on this host alone.

The processes find each other through a file, and talk over the loopback interface. The group is not torch's default
one, which only full sharding needs.
"""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore, PrefixStore

_TIMEOUT = timedelta(minutes=30)
"""One process may have far more to do than another; the death of one is noticed at once."""
_MEETING_TIMEOUT = timedelta(minutes=5)
_LOOPBACK = "127.0.0.1"
_LOOPBACK_INTERFACE = "lo"


class Collective:
    """One process's end. With a size of 1 there is nobody to talk to."""

    def __init__(self, rank: int = 0, size: int = 1, meeting_file: str = "", *, gpus: bool = False) -> None:
        self.rank = rank
        self.size = size
        self.device = torch.device("cuda", rank) if gpus else torch.device("cpu")
        self._meeting_file = meeting_file
        self._owns_default = False
        if gpus:
            torch.cuda.set_device(self.device)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", _LOOPBACK_INTERFACE)
        self._group: Any = self._open() if size > 1 else None

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, the same in each, on the CPU or the device as it came."""
        if self._group is None:
            return tensor
        total = tensor.to(self.device)
        self._group.allreduce([total]).wait()
        return total.to(tensor.device)

    def mesh(self) -> Any:
        """All processes as a device mesh, for FSDP2."""
        from torch.distributed.device_mesh import init_device_mesh

        if not self._owns_default:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK_INTERFACE)
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            store = self._store("default")
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=_TIMEOUT)
            self._owns_default = True
        return init_device_mesh(self.device.type, (self.size,))

    def close(self) -> None:
        """Leave the others."""
        self._group = None
        if self._owns_default:
            dist.destroy_process_group()
            self._owns_default = False

    def _open(self) -> Any:
        if self.device.type == "cuda":
            for_nccl: Any = dist.ProcessGroupNCCL.Options()
            for_nccl._timeout = _TIMEOUT
            return dist.ProcessGroupNCCL(self._store("sums"), self.rank, self.size, for_nccl)
        options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=_LOOPBACK)]
        options._timeout = _TIMEOUT
        return dist.ProcessGroupGloo(self._store("sums"), self.rank, self.size, options)

    def _store(self, name: str) -> Any:
        store = FileStore(self._meeting_file, self.size)
        store.set_timeout(_MEETING_TIMEOUT)
        return PrefixStore(name, store)
