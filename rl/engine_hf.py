"""`generate` of Hugging Face transformers as a `Driver`: the control for the engine, same interface, same numbers.

    requests -> one padded batch -> model.generate, with our sampler as its logits processor -> deliver
       ^                                    |
       +-- a request came in, weights are to count at once, many rows have ended: begun anew, with what is computed

One call of `generate` cannot take rows in or let them go. Between two tokens the thread executes what has come in, so
weights change in flight here too, and requests come in: then the call ends, and the next one begins where all rows are.
Rows that ran keep their keys and values (`KeysAndValues`), so that only rows that are new are computed from their
first token on.

That is what the policy `keep` means here: the keys and values of a row that runs stay those of the weights that they
were computed by, also over a batch that is begun anew. With `recompute` a change of weights lets go of all of them, and
the batch is begun anew from the token ids. By either policy a token's log-probability is of the distribution that it
was sampled from.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rl.config import EngineConfig
from rl.engine import ScoreRequest
from rl.engine_environment import set_engine_environment
from rl.engine_hf_batch import KeysAndValues, Rows, RowTurn, padded
from rl.engine_thread import Deliver, Request
from rl.generate import Sample
from rl.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

_LEAST_RUNNING = 0.75
"""A batch of which a smaller share still runs is begun anew without the rows that have ended."""


class _Sampler:
    """A choice of tokens as transformers takes one: scores of which the chosen token has the highest.

    Not a function, whose signature transformers would parse anew from a text, for half a millisecond, at every token.
    """

    def __init__(self, choose: "Callable[[torch.Tensor], torch.Tensor]") -> None:
        self._choose = choose

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """[batch, vocabulary] from the scores of the last tokens."""
        return scores.scatter_(1, self._choose(scores), math.inf)


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
        from transformers import GenerationConfig

        from rl.models import load_model

        self.version = version
        self._config = config
        self._tokenizer = tokenizer
        self._deliver = deliver
        self._model: Any = load_model(model_folder).to("cuda" if gpus else "cpu").eval().requires_grad_(False)
        # Where a turn ends, and of which distribution it is sampled, is for us to say: the model's own settings may
        # have an end token, behind which transformers would go on with padding, and penalties.
        self._model.generation_config = GenerationConfig()
        self._generation = GenerationConfig(do_sample=False, pad_token_id=0, return_dict_in_generate=True)
        self._turns: dict[int, RowTurn] = {}
        self._kept: KeysAndValues | None = None
        """Of the rows that ran when the last batch was ended."""
        self._again = False
        """Whether the running batch is to be begun anew from its token ids."""

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._turns)

    def add(self, key: int, request: Request) -> None:
        """Take a request, which begins with the next token of those that run; one to be scored is answered at once."""
        if len(request.token_ids) >= self._config.max_model_tokens:
            raise ValueError(
                f"a conversation of {len(request.token_ids)} tokens leaves no room in an engine of "
                f"{self._config.max_model_tokens}\n\nhint: raise `engine.max_model_tokens`"
            )
        if isinstance(request, ScoreRequest):
            self._deliver(key, self._score(request.token_ids))
        else:
            self._turns[key] = RowTurn(request, self._tokenizer, self._config.max_model_tokens)

    def drop(self, key: int) -> Sample | None:
        """Take a request out; its row of a running batch stays empty."""
        turn = self._turns.pop(key, None)
        return None if turn is None else turn.sample("abort")

    def step(self, between: Callable[[], bool]) -> None:
        """Sample all requests that are here, to their ends or until the batch is better begun anew."""
        import torch

        self._again = False
        with torch.inference_mode():
            batch = Rows(self._turns, self._model.device)
            cache = self._cache_for(batch)
            self._generation.max_new_tokens = batch.most

            def over(ids: "torch.Tensor", _: Any, **__: Any) -> "torch.Tensor":
                return torch.full((len(ids),), not between() or self._is_over(batch), device=ids.device)

            ended = self._model.generate(
                input_ids=batch.token_ids,
                attention_mask=batch.mask,
                generation_config=self._generation,
                logits_processor=[_Sampler(lambda scores: self._sample(batch, scores))],
                stopping_criteria=[over],
                **({} if cache is None else {"past_key_values": cache}),
            )
        self._kept = None
        if self._turns and not self._again:
            self._kept = KeysAndValues(batch, ended.past_key_values)

    def swap(self, tensors: "Mapping[str, torch.Tensor]", version: int) -> None:
        """Copy other weights in."""
        self._model.load_state_dict(tensors, strict=False)
        if self._config.kv_policy == "recompute":
            self._again, self._kept = True, None
        self.version = version

    def close(self) -> None:
        """Let go of the model."""
        self._kept = None
        del self._model

    def _cache_for(self, batch: Rows) -> Any:
        """Keys and values of all rows but of their last tokens; None where no row has any, or they cannot be kept."""
        kept, self._kept = self._kept, None
        if kept is None or not kept.can_be_rearranged:
            return None
        new = [turn.whole[:-1] for turn in batch.turns if not kept.holds(turn)]
        if len(new) == len(batch.turns):
            return None
        return kept.rearranged(batch, self._computed(new) if new else None)

    def _computed(self, rows: list[list[int]]) -> Any:
        """The cache of some conversations."""
        token_ids, mask = padded(rows, self._model.device)
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)
        model = self._model.base_model
        return model(input_ids=token_ids, attention_mask=mask, position_ids=positions, use_cache=True).past_key_values

    def _is_over(self, batch: Rows) -> bool:
        """Whether to go on by another batch, or not at all."""
        num_running = sum(key in self._turns for _, key, _ in batch.running)
        waits = len(self._turns) > num_running
        return self._again or waits or num_running < _LEAST_RUNNING * len(batch.turns)

    def _sample(self, batch: Rows, scores: "torch.Tensor") -> "torch.Tensor":
        """[batch, 1] the next token of each row, noted where the row still runs, delivered where it ends with it."""
        chosen, logprobs = batch.choose(scores)
        token_list: list[int] = chosen[:, 0].tolist()
        logprob_list: list[float] = logprobs[:, 0].tolist()
        if not math.isfinite(sum(logprob_list)):
            raise RuntimeError(f"the model's logits are not numbers, with weights of version {self.version}")
        running, batch.running = batch.running, []
        for row, key, turn in running:
            if self._turns.get(key) is not turn:
                continue
            token = token_list[row]
            over = turn.take(token, logprob_list[row], self.version)
            stopped = over or (turn.rule is not None and token == self._tokenizer.eos_token_id)
            if stopped or len(turn.token_ids) >= turn.most:
                del self._turns[key]
                self._deliver(key, turn.sample("stop" if stopped else "length"))
            else:
                batch.running.append((row, key, turn))
        return chosen

    def _score(self, token_ids: tuple[int, ...]) -> tuple[float, ...]:
        import torch

        ids = torch.tensor([token_ids], device=self._model.device)
        with torch.inference_mode():
            logprobs = torch.log_softmax(self._model(input_ids=ids).logits[0, :-1].float(), -1)
            scores: list[float] = logprobs.gather(-1, ids[0, 1:, None])[:, 0].tolist()
        return tuple(scores)
