"""A learner whose device is slept: weights of a given size that are really published, and say nothing.

The first element of every tensor is the version, so that who pulls them can see which ones came.
"""

import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from rl.collective import Collective
from rl.emulation import LearnerEmulation
from rl.types import Batch, TrainMetrics
from rl.weights import Manifest

STATE_FILE = "emulated.json"
_TENSOR_BYTES = 1 << 26
"""Of the largest tensor."""
_ITEM_BYTES = 4


class EmulatedLearner:
    """One process's part of it, as `rl.learner.Learner`. Used from one thread."""

    def __init__(self, emulation: LearnerEmulation, folder: str, collective: Collective) -> None:
        """Weights of version 0, or of the version that `save` wrote to `folder`."""
        self._emulation = emulation
        self._num_processes = collective.size
        self._rank = collective.rank
        self.version = json.loads(Path(folder, STATE_FILE).read_text())["version"] if folder else 0
        """Of the weights as they are now."""
        self._weights = _tensors(emulation.num_bytes)
        self._mark()
        self.manifest = Manifest.of(self._weights)
        """What is published."""

    def update(self, batch: Batch) -> TrainMetrics:
        """Take the time of one optimizer step. What only a model could say is not a number."""
        started = time.perf_counter()
        trajectories = batch.trajectories
        share = sum(len(each.token_ids) for each in trajectories) / self._num_processes
        time.sleep(self._emulation.update_s + self._emulation.update_s_per_token * share)
        self.version = batch.version + 1
        self._mark()
        count, staleness = len(trajectories), batch.staleness
        return TrainMetrics(
            update=batch.update,
            version=self.version,
            loss=0.0,
            gradient_norm=0.0,
            learning_rate=0.0,
            num_groups=len(batch.groups),
            num_trajectories=count,
            num_tokens=sum(each.num_sampled for each in trajectories),
            mean_reward=sum(each.reward for each in trajectories) / count,
            correct_rate=sum(each.failure_mode == "success" for each in trajectories) / count,
            format_rate=sum(each.answer is not None for each in trajectories) / count,
            staleness_mean=sum(staleness) / len(staleness),
            staleness_max=max(staleness),
            effective_sample_size=math.nan,
            k3_kl=math.nan,
            clip_fraction=math.nan,
            entropy=math.nan,
            duration_s=time.perf_counter() - started,
        )

    def probe(self) -> tuple[float, ...]:
        """Nothing: there is no model that an engine could agree with."""
        return ()

    def state(self) -> dict[str, Tensor]:
        """Name -> weights, not copied."""
        return self._weights

    def save(self, folder: str) -> None:
        """The version; the first process writes."""
        if self._rank:
            return
        path = Path(folder, STATE_FILE)
        beside = path.with_name(f".{STATE_FILE}")
        beside.write_text(json.dumps({"version": self.version}))
        beside.replace(path)

    def _mark(self) -> None:
        for tensor in self._weights.values():
            tensor[0] = self.version


def _tensors(num_bytes: int) -> dict[str, Tensor]:
    sizes = [_TENSOR_BYTES] * (num_bytes // _TENSOR_BYTES)
    if rest := num_bytes % _TENSOR_BYTES:
        sizes.append(max(rest, _ITEM_BYTES))
    return {f"weights.{number}": torch.zeros(size // _ITEM_BYTES) for number, size in enumerate(sizes)}
