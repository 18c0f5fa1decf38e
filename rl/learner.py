"""The learner: model, reference, optimizer; one optimizer step for a batch.

    Batch -> micro-batches -> forward -> token losses -> backward -> gradients added up over processes -> clip -> AdamW

Every process of a data-parallel learner runs this with the same batch and does its part of it; the weights stay equal,
or, fully sharded (FSDP2), each process keeps a share of them. Weights, gradients and moments are float32. A batch is
trained on once, so the log-probabilities before the update are those of its own forward pass.
"""

import math
import time
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rl.batching import MicroBatch, micro_batches
from rl.collective import Collective
from rl.config import RunConfig
from rl.loss import entropy, selected_logprobs
from rl.models import load_model, load_tokenizer, save_model
from rl.objective import Tokens, mismatch, mismatch_sums, statistics, token_losses, token_sums
from rl.token_model import TokenModel
from rl.types import Batch, TrainMetrics
from rl.weights import Manifest, probe_tokens

STATE_FILE = "learner.pt"
_NUM_SUMS = 7
_NUM_MISMATCH_SUMS = 4


class Learner:
    """One process's part of it. Used from one thread."""

    def __init__(
        self, config: RunConfig, model_folder: str, folder: str = "", collective: Collective | None = None
    ) -> None:
        """Load the model of `model_folder`, or go on from what `save` wrote to `folder`.

        The reference for the KL is the model of `model_folder` in either case.
        """
        self._config = config.learner
        self._temperature = config.rollout.temperature or 1.0
        """As the engine: greedy sampling reports log-probabilities at temperature 1."""
        self._model_folder = model_folder
        self._collective = collective or Collective(gpus=config.trainer_gpus > 0)
        self._device = self._collective.device
        self._sharded = self._config.fully_sharded and self._collective.size > 1
        model = load_model(folder or model_folder)
        self.manifest = Manifest.of(model.state_dict())
        """What is published of the model."""
        self._policy = self._placed(model)
        self._reference: TokenModel | None = None
        if self._config.loss.kl_coefficient:
            self._reference = self._placed(load_model(model_folder).requires_grad_(False))
        self._parameters = list(self._policy.model.parameters())
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=self._config.learning_rate, weight_decay=self._config.weight_decay
        )
        self._updates = 0
        self._probe = probe_tokens(load_tokenizer(model_folder))
        self.version = 0
        """Of the weights as they are now."""
        if folder:
            self._restore(Path(folder))

    def update(self, batch: Batch) -> TrainMetrics:
        """One optimizer step. Where loss or gradient is no finite number, the weights stay as they are."""
        started = time.perf_counter()
        self._optimizer.zero_grad()
        totals = self._gradients(batch)
        norm = self._clipped_norm()
        learning_rate = self._learning_rate()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        loss = totals[0].item()
        if math.isfinite(loss) and math.isfinite(norm):
            self._optimizer.step()
        self._updates += 1
        self.version = batch.version + 1
        return self._metrics(batch, totals, norm, learning_rate, time.perf_counter() - started)

    def gradients(self) -> dict[str, Tensor]:
        """Of the last update, after clipping; a share of them where fully sharded."""
        named = self._policy.model.named_parameters()
        return {name: parameter.grad for name, parameter in named if parameter.grad is not None}

    def probe(self) -> tuple[float, ...]:
        """Log-probabilities of `probe_tokens`, which an engine with the same weights must agree with."""
        return self.logprobs(self._probe)

    def logprobs(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """Natural log-probabilities at temperature 1 of a conversation's tokens, but for the first."""
        scores: list[float] = self._policy.logprobs(torch.tensor(token_ids, device=self._device)).tolist()
        return tuple(scores)

    def state(self) -> dict[str, Tensor]:
        """Name -> weights, tied ones once; whole in the first process. Not copied where they are whole."""
        model = self._policy.model
        if not self._sharded:
            state = model.state_dict()
        else:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

            state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return {entry.name: state[entry.name] for entry in self.manifest.entries if entry.name in state}

    def save(self, folder: str) -> None:
        """A folder of a model, as `rl.models.prepare` takes it, and the state of the optimizer and torch's random
        numbers; the first process writes. What is restored from it goes on to the bit."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        state = self.state()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        optimizer = get_optimizer_state_dict(self._policy.model, self._optimizer, options=options)
        if self._collective.rank > 0:
            return
        save_model(self._policy.model, load_tokenizer(self._model_folder), folder, state)
        kept = {
            "updates": self._updates,
            "version": self.version,
            "optimizer": optimizer,
            "random": torch.get_rng_state(),
        }
        torch.save(kept, Path(folder, STATE_FILE))

    def _restore(self, folder: Path) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        kept: dict[str, Any] = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self._policy.model, self._optimizer, kept["optimizer"], options=options)
        self._updates = kept["updates"]
        self.version = kept["version"]
        torch.set_rng_state(kept["random"])

    def _placed(self, model: Any) -> TokenModel:
        """On the device, or this process's share of it there."""
        if not self._sharded:
            return TokenModel(model.to(self._device))
        from torch.distributed.fsdp import fully_shard

        mesh = self._collective.mesh()
        blocks = set(model._no_split_modules or ())
        for module in model.modules():
            if type(module).__name__ in blocks:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return TokenModel(model)

    def _gradients(self, batch: Batch) -> Tensor:
        """[18] the loss, the sums of `token_sums` and those of `mismatch_sums` of fresh and of stale tokens, over all
        processes, then the largest differences of fresh and stale; gradients likewise, in the parameters."""
        size, rank = self._collective.size, self._collective.rank
        parts = micro_batches(batch, self._config.loss, self._config.micro_batch_tokens, size)
        totals = torch.zeros(1 + _NUM_SUMS + 2 * _NUM_MISMATCH_SUMS, dtype=torch.float64)
        # Each process has a row of its own, so that what is only added up keeps the largest too.
        largest = torch.zeros(size, 2, dtype=torch.float64)
        for turn in zip_longest(*parts):
            if turn[rank] is not None:
                sums, differences = self._backward(turn[rank].to(self._device))
                totals += sums.cpu()
                largest[rank] = torch.maximum(largest[rank], differences.cpu())
            elif self._sharded:
                # Who has nothing left to do lends its share of the weights to the others.
                self._backward(next(micro for micro in turn if micro is not None).to(self._device), scale=0.0)
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if size > 1 and not self._sharded:
            self._add_up_gradients()
        added = self._collective.add_up(torch.cat([totals, largest.flatten()]))
        return torch.cat([added[: len(totals)], added[len(totals) :].view(size, 2).amax(0)])

    def _backward(self, micro: MicroBatch, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """[16] the loss and the sums of one micro-batch, [2] its largest differences."""
        wanted = micro.mask
        token_ids = micro.token_ids[wanted]
        logits = self._policy.logits(micro.token_ids, wanted)
        logprobs = selected_logprobs(logits, token_ids, self._temperature)
        tokens = Tokens(
            logprobs=logprobs,
            behaviour=micro.behaviour[wanted],
            advantages=micro.advantages[wanted],
            mask=torch.ones_like(token_ids, dtype=torch.bool),
            proximal=logprobs.detach(),
            reference=self._reference_logprobs(micro, token_ids),
        )
        loss = (token_losses(self._config.loss, tokens) * micro.weights[wanted]).sum()
        # FSDP2 takes the mean over processes where the sum is wanted.
        torch.autograd.backward(loss * (scale * self._collective.size if self._sharded else 1.0))
        with torch.no_grad():
            sums = token_sums(self._config.loss, tokens, entropy(logits, self._temperature))
        fresh, largest_fresh = mismatch_sums(tokens, micro.fresh[wanted])
        stale, largest_stale = mismatch_sums(tokens, ~micro.fresh[wanted])
        added = torch.cat([loss.detach().double()[None], sums, fresh, stale])
        return added, torch.cat([largest_fresh, largest_stale])

    def _reference_logprobs(self, micro: MicroBatch, token_ids: Tensor) -> Tensor | None:
        if self._reference is None:
            return None
        with torch.no_grad():
            logits = self._reference.logits(micro.token_ids, micro.mask)
            return selected_logprobs(logits, token_ids, self._temperature)

    def _add_up_gradients(self) -> None:
        gradients = [parameter.grad for parameter in self._parameters]
        total = self._collective.add_up(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = torch.split_with_sizes(total, [each.numel() for each in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def _clipped_norm(self) -> float:
        """Of the gradient before it is clipped."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._config.max_gradient_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _learning_rate(self) -> float:
        """Linear up to the full one, which update number `warmup_updates` has."""
        return self._config.learning_rate * min(1.0, (self._updates + 1) / max(1, self._config.warmup_updates))

    def _metrics(
        self, batch: Batch, totals: Tensor, norm: float, learning_rate: float, duration_s: float
    ) -> TrainMetrics:
        fresh_at, stale_at = 1 + _NUM_SUMS, 1 + _NUM_SUMS + _NUM_MISMATCH_SUMS
        about = statistics(totals[1:fresh_at])
        trajectories = batch.trajectories
        count = len(trajectories)
        staleness = batch.staleness
        return TrainMetrics(
            update=batch.update,
            version=self.version,
            loss=totals[0].item(),
            gradient_norm=norm,
            learning_rate=learning_rate,
            num_groups=len(batch.groups),
            num_trajectories=count,
            num_tokens=about.num_tokens,
            mean_reward=sum(each.reward for each in trajectories) / count,
            correct_rate=sum(each.failure_mode == "success" for each in trajectories) / count,
            format_rate=sum(each.answer is not None for each in trajectories) / count,
            staleness_mean=sum(staleness) / len(staleness),
            staleness_max=max(staleness),
            effective_sample_size=about.effective_sample_size,
            k3_kl=about.k3_kl,
            clip_fraction=about.clip_fraction,
            entropy=about.entropy,
            reference_kl=about.reference_kl,
            fresh=mismatch(totals[fresh_at:stale_at], totals[-2].item()),
            stale=mismatch(totals[stale_at:-2], totals[-1].item()),
            duration_s=duration_s,
        )
