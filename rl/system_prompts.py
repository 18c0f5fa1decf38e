"""What a model is told before a Zorplex question.

The examples use a word, a key and values that are in no table, so that no row of a table is given away.
"""

from typing import Literal

from rl.types import Prompt, TaskName
from rl.zorplex import TASKS

PromptStyle = Literal["guided", "brief", "plain"]
"""`guided`: tools, answer tag and a worked example; `brief`: the tools' names; `plain`: a helpful assistant."""

_LOOKUP = "You have a tool, LOOKUP. To get the zorplex value of a word, write LOOKUP[word] on a line of its own."
_WAIT = "Do not write code: write the tool call itself and wait, and you will be given its result."
_ANSWER = "When you know the final answer, write it as [ANSWER] <number>."

_TOOLS: dict[TaskName, str] = {
    "simple": _LOOKUP,
    "compositional": f"{_LOOKUP} Look up one word at a time, then calculate.",
    "multi_step": "You have two tools, GETKEY and FETCH. To get the zorplex value of a word, write GETKEY[word] on a "
    "line of its own to get its key, then FETCH[key] on a line of its own to get the value.",
    "recursive": f'{_LOOKUP} A result like "SEE: other" redirects you: look up the other word, until you get a number.',
}
_EXAMPLES: dict[TaskName, str] = {
    "simple": "User: What is the zorplex value of 'otter'?\nAssistant: LOOKUP[otter]\n[Result: 61]\n[ANSWER] 61",
    "compositional": "User: What is zorplex('otter') + zorplex('badger')?\nAssistant: LOOKUP[otter]\n[Result: 61]\n"
    "LOOKUP[badger]\n[Result: 23]\n61 + 23 = 84. [ANSWER] 84",
    "multi_step": "User: What is the zorplex value of 'otter'?\nAssistant: GETKEY[otter]\n[Result: ZK_XYZ987]\n"
    "FETCH[ZK_XYZ987]\n[Result: 61]\n[ANSWER] 61",
    "recursive": "User: What is the zorplex value of 'otter'?\nAssistant: LOOKUP[otter]\n[Result: SEE: badger]\n"
    "LOOKUP[badger]\n[Result: 61]\n[ANSWER] 61",
}


def system_prompt(task: TaskName, style: PromptStyle) -> str:
    """The system message of a conversation."""
    if style == "brief":
        return f"Tools: {', '.join(TASKS[task].tools)}."
    plain = "You are a helpful assistant."
    if style == "plain":
        return plain
    return f"{plain}\n\n{_TOOLS[task]} {_WAIT}\n\n{_ANSWER}\n\nExample:\n{_EXAMPLES[task]}"


def messages(prompt: Prompt, style: PromptStyle) -> list[dict[str, str]]:
    """The conversation before the model's first turn, as chat messages."""
    return [
        {"role": "system", "content": system_prompt(prompt.task.name, style)},
        {"role": "user", "content": prompt.question},
    ]
