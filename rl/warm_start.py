"""A model's first lesson: traces of the oracle, some of them of an oracle in haste, learned by supervised learning.

    prompts of the training split -> rollout(ScriptedEngine) -> trajectories with loss masks -> cross-entropy -> model

An oracle in haste guesses a number instead of asking a tool. A model that learned from both asks about as often as its
teachers did, and it calculates as well as a short lesson makes it: both are left to reinforcement learning. Sums are
taught column by column, since a short lesson is enough for sums of digits.
"""

import asyncio
import random
import re
from typing import TYPE_CHECKING, Any

from rl.prompts import PromptSet
from rl.rollout import RolloutSettings, rollout
from rl.scripted import ScriptedEngine, oracle
from rl.tokenizer import Tokenizer
from rl.types import Frozen, Task, Trajectory

if TYPE_CHECKING:
    import torch


class WarmStart(Frozen):
    """What is taught, and for how long."""

    lessons: tuple[tuple[Task, int], ...]
    """Tasks, each with its number of traces."""
    haste: float
    """Share of traces whose oracle guesses."""
    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 50
    settings: RolloutSettings = RolloutSettings(prompt_style="brief", max_turns=12)


RECIPE = WarmStart(
    lessons=(
        (Task(name="simple"), 1200),
        (Task(name="compositional"), 5000),
        (Task(name="multi_step"), 1000),
        (Task(name="recursive"), 1200),
    ),
    haste=0.55,
    steps=500,
    batch_size=32,
    learning_rate=1e-3,
)


def first_words(num_traces: int) -> WarmStart:
    """A lesson for a model that speaks already: the form of the task `simple`, and little more."""
    return WarmStart(
        lessons=((Task(name="simple"), num_traces),),
        haste=0.5,
        steps=max(1, num_traces // 2),
        batch_size=min(8, num_traces),
        learning_rate=2e-5,
        warmup_steps=2,
    )


_SUM = re.compile(r"(\d+) \+ (\d+) = \d+\. ")


def in_columns(text: str) -> str:
    """`67 + 58 = 125. ` -> `7 + 8 = 15, 6 + 5 + 1 = 12. `: ones, then tens and what is carried; other text as it is."""
    found = _SUM.match(text)
    if found is None:
        return text
    (tens, ones), (other_tens, other_ones) = (divmod(int(number), 10) for number in found.groups())
    carried = (ones + other_ones) // 10
    columns = f"{ones} + {other_ones} = {ones + other_ones}, "
    columns += f"{tens} + {other_tens} + {carried} = {tens + other_tens + carried}. "
    return columns + text[found.end() :]


def patient(conversation: str) -> str:
    """What the oracle says next, its sums in columns."""
    return in_columns(oracle(conversation))


def oracle_traces(tokenizer: Tokenizer, seed: int, recipe: WarmStart = RECIPE) -> list[Trajectory]:
    """Conversations about training prompts, the same for the same seed."""
    rng = random.Random(seed)

    def guess(_: str) -> str:
        return f"[ANSWER] {rng.randrange(100)}"

    async def converse() -> list[Trajectory]:
        found = []
        for task, count in recipe.lessons:
            prompts = PromptSet([task], "train", seed)
            for number in range(count):
                engine = ScriptedEngine(tokenizer, guess if rng.random() < recipe.haste else patient)
                prompt = prompts[number]
                found.append(await rollout(engine, tokenizer, prompt, recipe.settings, group_id=prompt.id, seed=seed))
        return found

    return asyncio.run(converse())


def warm_start(model: "torch.nn.Module", tokenizer: Tokenizer, seed: int, recipe: WarmStart = RECIPE) -> list[float]:
    """Teach the model; the loss of every step, in nats per token."""
    import torch

    traces = oracle_traces(tokenizer, seed, recipe)
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    losses = []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe)
        loss = _loss(model, rng.sample(traces, recipe.batch_size))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def _schedule(step: int, recipe: WarmStart) -> float:
    """Up, level, and down over the last two fifths."""
    return min(1.0, (step + 1) / recipe.warmup_steps, (recipe.steps - step) / (0.4 * recipe.steps))


def _loss(model: Any, traces: list[Trajectory]) -> "torch.Tensor":
    """Mean over the tokens that the oracle wrote."""
    import torch

    longest = max(len(trace.token_ids) for trace in traces)
    token_ids = torch.zeros(len(traces), longest, dtype=torch.long)
    mask = torch.zeros(len(traces), longest, dtype=torch.bool)
    for row, trace in enumerate(traces):
        token_ids[row, : len(trace.token_ids)] = torch.tensor(trace.token_ids)
        mask[row, : len(trace.token_ids)] = torch.tensor(trace.loss_mask)
    taught = mask[:, 1:]
    logits = model(input_ids=token_ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits[taught], token_ids[:, 1:][taught])
