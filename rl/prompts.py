"""Which questions are trained on and which are held out.

    PromptSet(tasks, "train", seed)[index] -> Prompt     PromptSet(tasks, "held_out", seed)[index] -> Prompt

The two never meet, in two ways. Every prompt has a table of its own, and the tables of the two are different ones, so a
value that was learned by heart is worth nothing. And a question is held out by the words it asks about, in whatever
order and with whatever operator, so a held-out question was never trained on either, about any table.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

from rl.types import Prompt, Task
from rl.zorplex import open_task

Split = Literal["train", "held_out"]

LARGEST_SEED = 2**32 - 1
"""Table seeds given by people end here; those of the sets begin behind it."""
_HELD_OUT_SHARE = 5
"""One question in so many is held out."""
_MOST_TABLES, _MOST_QUESTIONS = 100, 100
"""Where to look for a question of a split: a recursive table may ask about none of the words that are held out."""


class PromptSet:
    """An endless list of prompts, the same for the same arguments. A task takes its turn with the others.

    A run's place in it is one number, so that a run resumed at `index` goes on with prompts it has not seen.
    """

    def __init__(self, tasks: Sequence[Task], split: Split, seed: int) -> None:
        if not tasks:
            raise ValueError("a prompt set needs a task, got none")
        self._tasks = tuple(tasks)
        self._split = split
        self._seed = seed

    def __getitem__(self, index: int) -> Prompt:
        """The prompt at `index`, from 0."""
        if index < 0:
            raise IndexError(f"a prompt's index is 0 or more, got {index}")
        task = self._tasks[index % len(self._tasks)]
        for attempt in range(_MOST_TABLES):
            questions = open_task(task, self._table_seed(task, index, attempt)).prompts()
            for prompt in islice(questions, _MOST_QUESTIONS):
                if split_of(prompt) == self._split:
                    return prompt
        raise AssertionError(f"no question of split `{self._split}` in {_MOST_TABLES} tables of `{task.label}`")

    def __iter__(self) -> Iterator[Prompt]:
        index = 0
        while True:
            yield self[index]
            index += 1

    def _table_seed(self, task: Task, index: int, attempt: int) -> int:
        """Even for training, odd for what is held out."""
        number = _hash(f"{self._seed}/{task.label}/{index}/{attempt}") % 2**62
        return 2 * (LARGEST_SEED + 1 + number) + (self._split == "held_out")


def split_of(prompt: Prompt) -> Split:
    """Where a question belongs, by its words alone."""
    held_out = _hash(" ".join(sorted(prompt.words))) % _HELD_OUT_SHARE == 0
    return "held_out" if held_out else "train"


def stream(task: Task, seed: int, count: int) -> list[Prompt]:
    """The first questions about one table, of either split: what the original's scripts ask for a seed."""
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"a table seed is 0 to {LARGEST_SEED}, got {seed}")
    prompts = open_task(task, seed).prompts()
    return [next(prompts) for _ in range(count)]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
