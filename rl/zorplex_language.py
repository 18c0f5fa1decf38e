"""How a model speaks with the Zorplex tools: `LOOKUP[cat]`, `[Result: 42]`, `[ANSWER] 42`. Text in, meaning out.

Only text that the model wrote itself is ever read here; what a tool said is never searched for an answer.
"""

import re

_TOOL = r"(LOOKUP|GETKEY|FETCH)\[([^\[\]\n]+)\]"
_TAG = r"\[ANSWER\]\s*"
_NUMBER = r"-?[0-9][0-9.,]*"

STOP_PATTERN = rf"(?i)(?:{_TOOL})|{_TAG}{_NUMBER}[^0-9.,]"
"""A turn is over where this first matches: behind a tool call, or behind the character that ends the answer's number.
(`[ANSWER] 1` is not over, since `[ANSWER] 125` may follow.)"""

_TOOL_CALL = re.compile(_TOOL, re.IGNORECASE)
_ANSWER = re.compile(f"{_TAG}({_NUMBER})", re.IGNORECASE)
_WHOLE_NUMBER = re.compile(r"-?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)")
_RESULT = re.compile(r"\[\s*Result\s*:", re.IGNORECASE)


def read_tool_calls(text: str) -> list[tuple[str, str]]:
    """Tool names and arguments in the order of the text: tool in capitals, argument without quotes."""
    return [(tool.upper(), argument.strip().strip("'\"")) for tool, argument in _TOOL_CALL.findall(text)]


def read_answer(text: str, cut: bool = False) -> int | None:
    """The whole number behind the last answer tag, None where there is none.

    `cut` says that the text ends where it was cut off: a number that reaches its end may lack digits and is no answer.
    """
    answers = list(_ANSWER.finditer(text))
    if not answers or (cut and answers[-1].end() == len(text)):
        return None
    number = answers[-1][1].rstrip(".,")
    return int(number.replace(",", "")) if _WHOLE_NUMBER.fullmatch(number) else None


def writes_results(text: str) -> bool:
    """Whether the model wrote a `[Result: ...]` itself, which only tools may."""
    return _RESULT.search(text) is not None


def render_results(results: list[str]) -> str:
    """What is put behind a turn with tool calls."""
    return f"\n[Result: {', '.join(results)}]\n"
