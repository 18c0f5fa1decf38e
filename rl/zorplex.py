"""The four Zorplex tasks: questions about a table that a model cannot know, and the tools to look it up.

    Zorplex(task, table_seed) -> prompts() -> Prompt       call(tool, argument) -> result       solution(prompt)

For a seed, questions and answers are the original's, to the bit.
"""

import operator
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping

from rl.types import Operator, Prompt, Task, TaskName, ToolCall
from rl.zorplex_table import WORDS, fetch_key, redirect_table, resolve, value_table

OPERATORS: dict[Operator, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


class Zorplex(ABC):
    """One task over the table of one seed."""

    description: str
    tools: tuple[str, ...] = ("LOOKUP",)

    def __init__(self, task: Task, table_seed: int) -> None:
        self.task = task
        self.table_seed = table_seed
        self.values = value_table(table_seed)
        self.table: Mapping[str, int | str] = self.values
        """What `LOOKUP` says about a word."""
        self._rng = random.Random(table_seed)

    def prompts(self) -> Iterator[Prompt]:
        """The endless stream of questions; every call starts it anew."""
        rng = random.Random()
        rng.setstate(self._rng.getstate())
        number = 0
        while True:
            yield self._draw(rng, number)
            number += 1

    def call(self, tool: str, argument: str) -> str:
        """What the tool says; an unknown tool, word or key has an answer of its own, e.g. `UNKNOWN`."""
        return str(self.table.get(argument.lower(), "UNKNOWN")) if tool == "LOOKUP" else "UNKNOWN_TOOL"

    @abstractmethod
    def solution(self, prompt: Prompt) -> list[ToolCall]:
        """The fewest tool calls that lead to the answer, in order, with their results."""

    @abstractmethod
    def _draw(self, rng: random.Random, number: int) -> Prompt: ...

    def _about_one_word(self, number: int, word: str, answer: int) -> Prompt:
        question = f"What is the zorplex value of '{word}'?"
        return Prompt(
            task=self.task, table_seed=self.table_seed, number=number, question=question, words=(word,), answer=answer
        )

    def _called(self, tool: str, argument: str) -> ToolCall:
        return ToolCall(tool=tool, argument=argument, result=self.call(tool, argument))


class Simple(Zorplex):
    """`What is the zorplex value of 'cat'?` with `LOOKUP[cat]` -> 4."""

    description = "Single LOOKUP call"

    def solution(self, prompt: Prompt) -> list[ToolCall]:
        return [self._called("LOOKUP", word) for word in prompt.words]

    def _draw(self, rng: random.Random, number: int) -> Prompt:
        word = rng.choice(WORDS)
        return self._about_one_word(number, word, self.values[word])


class Compositional(Simple):
    """`What is zorplex('cat') + zorplex('dog')?`: several lookups, then arithmetic from left to right."""

    description = "Multiple LOOKUPs + arithmetic"

    def _draw(self, rng: random.Random, number: int) -> Prompt:
        words = tuple(rng.sample(WORDS, 3 if self.task.difficulty == "hard" else 2))
        symbols: list[Operator] = ["+"] if self.task.difficulty == "easy" else ["+", "-", "*"]
        symbol = rng.choice(symbols)
        answer = self.values[words[0]]
        for word in words[1:]:
            answer = OPERATORS[symbol](answer, self.values[word])
        terms = f" {symbol} ".join(f"zorplex('{word}')" for word in words)
        return Prompt(
            task=self.task,
            table_seed=self.table_seed,
            number=number,
            question=f"What is {terms}?",
            words=words,
            operator=symbol,
            answer=answer,
        )


class MultiStep(Simple):
    """`GETKEY[cat]` -> `ZK_123ABC`, then `FETCH[ZK_123ABC]` -> 4."""

    description = "GETKEY -> FETCH chain"
    tools = ("GETKEY", "FETCH")

    def __init__(self, task: Task, table_seed: int) -> None:
        super().__init__(task, table_seed)
        self._word_of = {fetch_key(word, table_seed): word for word in WORDS}

    def call(self, tool: str, argument: str) -> str:
        if tool == "GETKEY":
            word = argument.lower()
            return fetch_key(word, self.table_seed) if word in self.values else "UNKNOWN_WORD"
        if tool == "FETCH":
            found = self._word_of.get(argument.upper())
            return "INVALID_KEY" if found is None else str(self.values[found])
        return "UNKNOWN_TOOL"

    def solution(self, prompt: Prompt) -> list[ToolCall]:
        key = self._called("GETKEY", prompt.words[0])
        return [key, self._called("FETCH", key.result)]


class Recursive(Zorplex):
    """`LOOKUP[cat]` -> `SEE: dog`, `LOOKUP[dog]` -> 95: at most `max_depth` redirects, then a value."""

    description = "Follow LOOKUP redirects"

    def __init__(self, task: Task, table_seed: int) -> None:
        super().__init__(task, table_seed)
        self.table = redirect_table(table_seed, task.max_depth, self._rng)
        self._redirectors = [word for word, found in self.table.items() if isinstance(found, str)]

    def solution(self, prompt: Prompt) -> list[ToolCall]:
        return [self._called("LOOKUP", word) for word in resolve(self.table, prompt.words[0])]

    def _draw(self, rng: random.Random, number: int) -> Prompt:
        word = rng.choice(self._redirectors)
        return self._about_one_word(number, word, self.values[resolve(self.table, word)[-1]])


TASKS: dict[TaskName, type[Zorplex]] = {
    "simple": Simple,
    "compositional": Compositional,
    "multi_step": MultiStep,
    "recursive": Recursive,
}


def open_task(task: Task, table_seed: int) -> Zorplex:
    """The task over the table of a seed."""
    return TASKS[task.name](task, table_seed)
