"""`generate` of Hugging Face transformers as a `Driver`: the control for the engine, same interface, same numbers.

    waiting requests -> one padded batch -> model.generate, with our sampler as its logits processor -> deliver

The batch is static: who comes while it runs waits for its end. Between two tokens the thread executes what has come in,
so weights change in flight here too; with the policy `recompute` the batch is then begun anew from where it is.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rl.config import EngineConfig
from rl.engine import ScoreRequest
from rl.engine_environment import set_engine_environment
from rl.engine_thread import Deliver, Request
from rl.generate import Finish, GenerateRequest, Sample
from rl.stop_rule import StopRule
from rl.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch


class _Turn:
    """A request that waits or runs."""

    def __init__(self, request: GenerateRequest, tokenizer: Tokenizer) -> None:
        import torch

        self.request = request
        self.rule = None if request.to_the_end else StopRule(tokenizer, request.stop_pattern)
        self.generator = torch.Generator().manual_seed(request.seed)
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []

    def sample(self, finish: Finish) -> Sample:
        return Sample(
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            versions=tuple(self.versions),
            finish=finish,
        )


class HfDriver:
    """One transformers model. Used by one thread."""

    def __init__(
        self,
        config: EngineConfig,
        model_folder: str,
        tokenizer: Tokenizer,
        deliver: Deliver,
        *,
        version: int = 0,
        gpus: float = 0,
    ) -> None:
        set_engine_environment(config, gpus)
        from rl.models import load_model

        self.version = version
        self._config = config
        self._tokenizer = tokenizer
        self._deliver = deliver
        self._model: Any = load_model(model_folder).to("cuda" if gpus else "cpu").eval().requires_grad_(False)
        # Where a turn ends is for us to say: behind this token transformers would go on with padding.
        ends: Any = self._model.generation_config
        ends.eos_token_id = None
        self._turns: dict[int, _Turn] = {}
        self._again = False
        """Whether the running batch is to be begun anew."""

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._turns)

    def add(self, key: int, request: Request) -> None:
        """Take a request; one to be scored is answered at once."""
        if len(request.token_ids) >= self._config.max_model_tokens:
            raise ValueError(
                f"a conversation of {len(request.token_ids)} tokens leaves no room in an engine of "
                f"{self._config.max_model_tokens}\n\nhint: raise `engine.max_model_tokens`"
            )
        if isinstance(request, ScoreRequest):
            self._deliver(key, self._score(request.token_ids))
        else:
            self._turns[key] = _Turn(request, self._tokenizer)

    def drop(self, key: int) -> Sample | None:
        """Take a request out; its row of a running batch stays empty."""
        turn = self._turns.pop(key, None)
        return None if turn is None else turn.sample("abort")

    def step(self, between: Callable[[], bool]) -> None:
        """Sample all requests that are here to their ends."""
        import torch
        from transformers import GenerationConfig

        self._again = False
        batch = dict(self._turns)
        rows = [turn.request.token_ids + tuple(turn.token_ids) for turn in batch.values()]
        width = max(map(len, rows))
        token_ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            token_ids[number, width - len(row) :] = torch.tensor(row)
            mask[number, width - len(row) :] = 1

        def sample(_: Any, scores: "torch.Tensor") -> "torch.Tensor":
            chosen = self._sample(batch, scores).to(scores.device)
            return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)

        def over(ids: "torch.Tensor", _: Any, **__: Any) -> "torch.Tensor":
            ended = not between() or self._again or not any(key in self._turns for key in batch)
            return torch.full((len(ids),), ended, device=ids.device)

        most = max(turn.request.max_tokens - len(turn.token_ids) for turn in batch.values())
        device = self._model.device
        with torch.inference_mode():
            self._model.generate(
                input_ids=token_ids.to(device),
                attention_mask=mask.to(device),
                generation_config=GenerationConfig(do_sample=False, max_new_tokens=most, pad_token_id=0),
                logits_processor=[sample],
                stopping_criteria=[over],
            )

    def swap(self, tensors: "Mapping[str, torch.Tensor]", version: int) -> None:
        """Copy other weights in."""
        self._model.load_state_dict(tensors, strict=False)
        self._again = self._config.kv_policy == "recompute"
        self.version = version

    def close(self) -> None:
        """Let go of the model."""
        del self._model

    def _sample(self, batch: dict[int, _Turn], scores: "torch.Tensor") -> "torch.Tensor":
        """[batch] the next token of each row, noted where the row still runs, and delivered where it ends with it."""
        import torch

        chosen = torch.zeros(len(batch), dtype=torch.long)
        scores = scores.float().cpu()
        for row, (key, turn) in enumerate(batch.items()):
            if key not in self._turns:
                continue
            temperature = turn.request.temperature
            logprobs = torch.log_softmax(scores[row] / (temperature or 1.0), -1)
            if temperature:
                token = int(torch.multinomial(logprobs.exp(), 1, generator=turn.generator))
            else:
                token = int(logprobs.argmax())
            chosen[row] = token
            turn.token_ids.append(token)
            turn.logprobs.append(float(logprobs[token]))
            turn.versions.append(self.version)
            rule = turn.rule
            stopped = rule is not None and (rule.over(token) or token == self._tokenizer.eos_token_id)
            length = len(turn.request.token_ids) + len(turn.token_ids)
            full = len(turn.token_ids) >= turn.request.max_tokens or length >= self._config.max_model_tokens
            if stopped or full:
                del self._turns[key]
                self._deliver(key, turn.sample("stop" if stopped else "length"))
        return chosen

    def _score(self, token_ids: tuple[int, ...]) -> tuple[float, ...]:
        import torch

        ids = torch.tensor([token_ids], device=self._model.device)
        with torch.inference_mode():
            logprobs = torch.log_softmax(self._model(input_ids=ids).logits[0, :-1].float(), -1)
            scores: list[float] = logprobs.gather(-1, ids[0, 1:, None])[:, 0].tolist()
        return tuple(scores)
