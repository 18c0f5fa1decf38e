"""vLLM as a `Driver`: in this process, stepped by our thread, its weights replaced between two steps.

    add -> LLMEngine.step -> one token each -> stop rule -> deliver
    swap: layer by layer into the running model, packed anew, then the KV policy

What is sampled in a step comes from one version of the weights, so every token is recorded with its version. Requests
that begin after a swap never read keys and values of older weights, whatever the policy.
"""

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rl.config import EngineConfig
from rl.engine_environment import set_engine_environment
from rl.engine_thread import Deliver, Request
from rl.engine_turn import Turn
from rl.generate import GenerateRequest, Sample
from rl.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

_open_or_closed: dict[int, tuple[Any, bool]] = {}
"""The engines of this process, and whether each is open. They share vLLM's process groups, which end with the first
engine that is shut down, so all are shut down when the last is closed."""
_lock = threading.Lock()
_one_forward_pass = threading.Lock()
"""vLLM keeps the context of a forward pass, and the config of an engine that is being made, once for the process: two
engines at the same time would compute with each other's."""

_MOST_TOKENS_OF_A_STEP = 2048
_BLOCK_TOKENS = 32
"""Keys and values are cached and shared in pieces of so many tokens."""


class VllmDriver:
    """One vLLM engine. Used by one thread."""

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
        from vllm import EngineArgs, LLMEngine

        self.version = version
        self._num_swaps = 0
        self._config = config
        self._tokenizer = tokenizer
        self._deliver = deliver
        self._turns: dict[str, Turn | None] = {}
        """By the engine's name of the request; None for one to be scored."""
        on_cpu: dict[str, Any] = {
            "kv_cache_memory_bytes": int(config.cache_gb * 2**30),
            "block_size": _BLOCK_TOKENS,
            # Between pieces of a prompt vLLM winds a request's random numbers back, which a CPU's generator refuses.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(_MOST_TOKENS_OF_A_STEP, config.max_model_tokens),
        }
        with _one_forward_pass:
            self._engine = LLMEngine.from_engine_args(
                EngineArgs(
                    model=model_folder,
                    skip_tokenizer_init=True,
                    dtype="auto" if gpus else "float32",
                    max_model_len=config.max_model_tokens,
                    tensor_parallel_size=max(1, int(gpus)),
                    enforce_eager=not gpus,
                    # A step's tokens are here when the step ends, so it is known which weights they came from.
                    async_scheduling=False,
                    enable_prefix_caching=not config.reproducible,
                    logprobs_mode="processed_logprobs",
                    disable_log_stats=True,
                    **({} if gpus else on_cpu),
                )
            )
        with _lock:
            _open_or_closed[id(self._engine)] = (self._engine, True)

    @property
    def busy(self) -> bool:
        """Whether a request runs."""
        return bool(self._turns)

    def add(self, key: int, request: Request) -> None:
        """Take a request."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        if len(request.token_ids) >= self._config.max_model_tokens:
            raise ValueError(
                f"a conversation of {len(request.token_ids)} tokens leaves no room in an engine of "
                f"{self._config.max_model_tokens}\n\nhint: raise `engine.max_model_tokens`"
            )
        name = str(key)
        if isinstance(request, GenerateRequest):
            params = SamplingParams(
                temperature=request.temperature,
                seed=request.seed,
                max_tokens=request.max_tokens,
                stop_token_ids=[] if request.to_the_end else [self._tokenizer.eos_token_id],
                ignore_eos=request.to_the_end,
                logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
        else:
            params = SamplingParams(
                temperature=0,
                max_tokens=1,
                prompt_logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
        # Keys and values are shared among requests of the same salt alone. A version is none: a trainer that went back
        # to its checkpoint gives the same numbers to other weights.
        prompt = tokens_input(list(request.token_ids), cache_salt=str(self._num_swaps))
        self._engine.add_request(name, prompt, params)
        self._turns[name] = Turn(request, self._tokenizer) if isinstance(request, GenerateRequest) else None

    def drop(self, key: int) -> Sample | None:
        """Take a request out."""
        self._engine.abort_request([str(key)])
        turn = self._turns.pop(str(key), None)
        return None if turn is None else turn.sample("abort")

    def step(self, between: Callable[[], bool]) -> None:
        """One token for each running request."""
        over = []
        with _one_forward_pass:
            outputs = self._engine.step()
        for output in outputs:
            name = output.request_id
            if name not in self._turns:
                continue
            turn = self._turns[name]
            if turn is None:
                del self._turns[name]
                self._deliver(int(name), _scores(output.prompt_token_ids, output.prompt_logprobs))
                continue
            new = output.outputs[0]
            stopped = False
            for token, choices in zip(new.token_ids, new.logprobs, strict=True):
                stopped = turn.take(token, choices[token].logprob, self.version)
            if stopped and not output.finished:
                over.append(name)
            if stopped or output.finished:
                del self._turns[name]
                ended_itself = stopped or new.finish_reason == "stop"
                self._deliver(int(name), turn.sample("stop" if ended_itself else "length"))
        if over:
            self._engine.abort_request(over)

    def swap(self, tensors: "Mapping[str, torch.Tensor]", version: int) -> None:
        """Copy other weights in."""
        self._num_swaps += 1
        with _one_forward_pass:
            self._engine.collective_rpc(reload, args=(dict(tensors), self.repack))
        if self._config.kv_policy == "recompute":
            self._engine.reset_prefix_cache(reset_running_requests=True)
        self.version = version

    def close(self) -> None:
        """Let go of the model, the cache and the worker."""
        with _lock:
            _open_or_closed[id(self._engine)] = (self._engine, False)
            if any(is_open for _, is_open in _open_or_closed.values()):
                return
            for engine, _ in _open_or_closed.values():
                engine.engine_core.shutdown()
            _open_or_closed.clear()

    @staticmethod
    def repack(model: Any) -> None:
        """Pack the layers again that were not loaded by name.

        On CPUs vLLM multiplies by a packed copy of each matrix. A head that is tied to the embeddings has no tensor of
        its own in the checkpoint, so nothing but this would bring its copy up to date.
        """
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        for module in model.modules():
            weight = getattr(module, "weight", None)
            if hasattr(module, "cpu_linear") and weight is not None and weight.numel():
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def reload(worker: Any, tensors: "Mapping[str, torch.Tensor]", repack: Callable[[Any], None]) -> None:
    """In the engine's worker: the checkpoint's tensors into the model's own layers."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model = worker.get_model()
    with torch.no_grad(), torch.device(worker.device), set_current_vllm_config(worker.vllm_config):
        initialize_layerwise_reload(model)
        model.load_weights(tensors.items())
        finalize_layerwise_reload(model, worker.model_config)
        repack(model)


def _scores(token_ids: Any, choices: Any) -> tuple[float, ...]:
    """[T - 1]; the first token has none."""
    return tuple(found[token].logprob for token, found in zip(token_ids[1:], choices[1:], strict=True))
