"""One run of TRL's `GRPOTrainer`, in its environment: `python -m rl.bench.peer_trl_run REQUEST.json RESULT.json`.

PeerRequest -> prompts, reward, lengths of ours -> GRPOTrainer.train -> CellRun
"""

import asyncio
import resource
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback

from rl.bench.child import answer
from rl.bench.peer_tokenizer import HuggingFaceTiny
from rl.bench.peer_trl import PeerRequest
from rl.bench.results import Accounting, CellRun, RewardPoint, RoleUsage, StartUp
from rl.config import LearnerConfig
from rl.generate import GenerateRequest, Sample
from rl.ledger import group_id
from rl.loss_settings import LossSettings
from rl.models import TINY_TOKENIZER
from rl.pinning import pin
from rl.prompts import PromptSet
from rl.rollout import RolloutSettings, rollout
from rl.system_prompts import messages
from rl.tokenizer import TinyTokenizer, Tokenizer
from rl.types import Prompt, Trajectory

_MICRO_BATCH_TOKENS = LearnerConfig().micro_batch_tokens
"""Padded tokens of one forward pass, as our learner has it."""


class FixedLengths(LogitsProcessor):  # type: ignore[misc]  # transformers is not followed
    """Lets each row end with the end-of-turn token when it has its length, and not before."""

    def __init__(self, lengths: list[int], prompt_width: int, end_ids: list[int]) -> None:
        self._lengths = torch.tensor(lengths)
        self._prompt_width = prompt_width
        self._end_ids = end_ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[rows, V] scores of the next token."""
        scores[:, self._end_ids] = -torch.inf
        over = input_ids.shape[1] - self._prompt_width + 1 >= self._lengths
        scores[over] = -torch.inf
        scores[over, self._end_ids[0]] = 0.0
        return scores


class Workload:
    """Prompts, lengths and rewards: those that a run of ours with this seed has."""

    def __init__(self, request: PeerRequest, tokenizer: Tokenizer) -> None:
        config = request.config
        self._tokenizer = tokenizer
        self._seed = request.run.seed
        self._prompts = PromptSet([config.task], "train", self._seed)
        self._lengths = config.lengths
        self._group_size = config.group_size
        self._per_update = config.groups_per_update
        self.settings = RolloutSettings(
            max_turns=1, max_tokens=config.max_tokens, prompt_style=config.prompt_style, lengths=config.lengths
        )

    def rows(self, num_updates: int) -> list[dict[str, Any]]:
        """The data set: one row for each group, in the order in which we ask."""
        return [
            {"prompt": self.text(self._prompts[index]), "index": index}
            for index in range(num_updates * self._per_update)
        ]

    def text(self, prompt: Prompt) -> str:
        """The conversation up to the model's turn, as `rl.tokenizer.encode_messages` has it."""
        said = messages(prompt, self.settings.prompt_style)
        if self._tokenizer.chat_template is None:
            return "".join(f"{one['role'].capitalize()}: {one['content']}\n" for one in said) + "Assistant:"
        return self._tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)

    def lengths(self, update: int) -> list[int]:
        """[samples of one update] group by group."""
        first = update * self._per_update
        return [
            self._lengths.length(self._seed, group_id(index), sample)
            for index in range(first, first + self._per_update)
            for sample in range(self._group_size)
        ]

    def judged(self, index: int, sample: int, token_ids: list[int]) -> Trajectory:
        """What a sampled turn is worth, by the rollout that ours go through."""

        async def given(request: GenerateRequest) -> Sample:
            count = len(token_ids)
            return Sample(token_ids=tuple(token_ids), logprobs=(0.0,) * count, versions=(0,) * count, finish="length")

        return asyncio.run(
            rollout(
                given,
                self._tokenizer,
                self._prompts[index],
                self.settings,
                group_id=group_id(index),
                sample=sample,
                seed=self._seed,
            )
        )


class Record:
    """What is written down while it trains; moments are of the monotonic clock."""

    def __init__(self) -> None:
        self.ends_s: list[float] = []
        """[updates]"""
        self.cpu_s: list[float] = []
        """[updates] of this process, at those moments."""
        self.generating: list[tuple[float, float]] = []
        """[updates] from, to"""
        self.samples: list[list[Trajectory]] = []
        """[updates][samples]"""


def measure(request: PeerRequest) -> CellRun:
    """Train, and make a run of a cell of it. Raises what TRL raises, and ValueError for a length that is wrong."""
    from datasets import Dataset
    from transformers.utils import logging
    from trl import GRPOConfig, GRPOTrainer

    pin(request.cores)
    torch.set_num_threads(len(request.cores))
    logging.disable_progress_bar()
    config = request.config
    folder = request.model_folder
    tiny = Path(folder, TINY_TOKENIZER)
    own: Any = TinyTokenizer.load(tiny) if tiny.exists() else AutoTokenizer.from_pretrained(folder)
    theirs: Any = HuggingFaceTiny(own) if tiny.exists() else own
    workload, record = Workload(request, own), Record()
    num_updates = config.warmup_updates + config.updates
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    rows = workload.rows(num_updates)
    num_samples = config.groups_per_update * config.group_size
    width = max(len(own.encode(row["prompt"], add_special_tokens=False)) for row in rows)
    micro = micro_batch(num_samples, width + config.lengths.max_tokens)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=_reward(workload, record, config.group_size),
        args=GRPOConfig(
            output_dir=request.folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=num_samples // micro,
            num_generations=config.group_size,
            max_completion_length=config.lengths.max_tokens,
            max_steps=num_updates,
            learning_rate=config.learning_rate,
            lr_scheduler_type="constant",
            loss_type={"token": "dapo", "sequence": "grpo", "sum": "dapo"}[LossSettings().mean],
            beta=0.0,
            shuffle_dataset=False,
            pad_to_multiple_of=None,
            dataloader_pin_memory=False,
            seed=request.run.seed,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=theirs,
        callbacks=[_Clock(record)],
    )
    _sample_by_length(model, trainer.eos_token_ids, workload, record, config.colocated_engine_threads)
    opened_at = time.time()
    began_s = time.perf_counter()
    trainer.train()
    return _cell_run(request, record, opened_at, began_s)


def micro_batch(num_samples: int, longest: int) -> int:
    """Samples of one forward pass: as many as our learner's padded tokens allow, in equal parts."""
    most = max(1, _MICRO_BATCH_TOKENS // longest)
    return max(size for size in range(1, num_samples + 1) if num_samples % size == 0 and size <= most)


def _reward(workload: Workload, record: Record, group_size: int) -> Any:
    def reward(prompts: list[str], completion_ids: list[list[int]], index: list[int], **_: Any) -> list[float]:
        samples = [
            workload.judged(index[row], row % group_size, token_ids) for row, token_ids in enumerate(completion_ids)
        ]
        wanted = workload.lengths(len(record.samples))
        found = [sample.num_sampled for sample in samples]
        if found != wanted:
            raise ValueError(f"the samples have {found} tokens, wanted {wanted}")
        record.samples.append(samples)
        return [sample.reward for sample in samples]

    return reward


def _sample_by_length(model: Any, end_ids: list[int], workload: Workload, record: Record, num_threads: int) -> None:
    """Let the model's `generate`, which TRL calls, sample the lengths of the workload, by as many threads as ours."""
    generate, of_training = model.generate, torch.get_num_threads()

    def generate_by_length(**arguments: Any) -> Any:
        began_s = time.perf_counter()
        lengths = workload.lengths(len(record.generating))
        processor = FixedLengths(lengths, arguments["input_ids"].shape[1], end_ids)
        torch.set_num_threads(num_threads)
        try:
            sampled = generate(**arguments, logits_processor=LogitsProcessorList([processor]))
        finally:
            torch.set_num_threads(of_training)
        record.generating.append((began_s, time.perf_counter()))
        return sampled

    model.generate = generate_by_length


class _Clock(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    def __init__(self, record: Record) -> None:
        self._record = record

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._record.ends_s.append(time.perf_counter())
        self._record.cpu_s.append(time.process_time())


def _cell_run(request: PeerRequest, record: Record, opened_at: float, began_s: float) -> CellRun:
    config = request.config
    first, last = config.warmup_updates, config.warmup_updates + config.updates
    if len(record.ends_s) != last or len(record.samples) != last:
        raise ValueError(f"TRL did {len(record.ends_s)} updates and {len(record.samples)} rollouts, wanted {last}")
    duration_s = record.ends_s[last - 1] - record.ends_s[first - 1]
    generating_s = sum(end - begin for begin, end in record.generating[first:last])
    since_process_s = opened_at - psutil.Process().create_time() - began_s
    measured = [sample for samples in record.samples[first:last] for sample in samples]
    every = [sample for samples in record.samples for sample in samples]
    trained = sum(sample.num_sampled for sample in measured)
    return request.run.model_copy(
        update={
            "num_updates": config.updates,
            "update_s": tuple(later - sooner for sooner, later in pairwise(record.ends_s[first - 1 : last])),
            "duration_s": duration_s,
            "trajectories": len(measured),
            "trained_tokens": trained,
            "generated_tokens": trained,
            "num_cores": len(request.cores),
            "trainer_idle": generating_s / duration_s,
            "generator_idle": 1 - generating_s / duration_s,
            "staleness": (0,) * (config.groups_per_update * config.updates),
            "accounting": Accounting(
                generated=sum(sample.num_sampled for sample in every),
                trained=sum(sample.num_sampled for sample in every),
                wasted=0,
                in_flight=0,
                consumed_trajectories=len(every),
                distinct_trajectories=len({(sample.group_id, sample.sample) for sample in every}),
            ),
            "start_up": StartUp(
                open_s=began_s + since_process_s,
                first_token_s=record.generating[0][1] + since_process_s,
                first_update_s=record.ends_s[0] + since_process_s,
            ),
            "usage": (
                RoleUsage(
                    role="loop",
                    peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
                    cpu_s=record.cpu_s[last - 1] - record.cpu_s[first - 1],
                ),
            ),
            "rewards": tuple(
                RewardPoint(
                    update=update,
                    wall_s=record.ends_s[update] - began_s,
                    mean_reward=sum(sample.reward for sample in samples) / len(samples),
                    correct_rate=sum(sample.failure_mode == "success" for sample in samples) / len(samples),
                )
                for update, samples in enumerate(record.samples)
            ),
        }
    )


def main() -> None:
    """In TRL's environment."""
    answer(PeerRequest, measure)


if __name__ == "__main__":
    main()
