"""`${{ }}` templates in plan values: found, read for what they refer to, and rendered when a step starts.

Rendering is pure (the workflow calls it, and replays it): no input or output, no clock, no chance. A scope has the keys
`params`, `steps` (id -> `{outputs, outcome, exit_code}`), `env`, `matrix` and `run` (`{id, attempt}`).
"""

import json
import re
import types
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

from bridge.problems import brief
from bridge.shell import ShellText, UnquotablePlace, quote, shell_script
from steps import Frozen, Shell

MAX_TEXT = 1_000_000
"""Characters of a text with templates, before and after rendering."""

_OPEN = "${{"
_TOKEN = re.compile(r"""\}\}|[{}\[\]()]|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'""", re.DOTALL)
_SHELL_MARKER = type(get_args(Shell)[1])


class ExpressionError(ValueError):
    """A template cannot be read or rendered. Final: the same template and scope fail again."""


class Expression(NamedTuple):
    """What stands between `${{` and `}}`."""

    source: str

    @property
    def template(self) -> str:
        """As written in a plan."""
        return f"${{{{ {self.source.strip()} }}}}"


Piece = str | Expression


def is_template(value: Any) -> bool:
    """True when a text with `${{` is anywhere in a nested value."""
    if isinstance(value, str):
        return _OPEN in value
    if isinstance(value, Mapping):
        return any(is_template(item) for item in value.values())
    return isinstance(value, list | tuple) and any(is_template(item) for item in value)


@lru_cache(maxsize=20_000)
def pieces(text: str) -> tuple[Piece, ...]:
    """The literal texts and expressions of a text, in order. Raises `ExpressionError` for an unclosed `${{`."""
    if len(text) > MAX_TEXT:
        raise ExpressionError(f"a text of {len(text):,} characters with a template, the limit is {MAX_TEXT:,}")
    found: list[Piece] = []
    position = 0
    while (start := text.find(_OPEN, position)) >= 0:
        if start > position:
            found.append(text[position:start])
        end = _end_of_expression(text, start + len(_OPEN))
        found.append(Expression(text[start + len(_OPEN) : end]))
        position = end + 2
    if position < len(text):
        found.append(text[position:])
    return tuple(found)


def _end_of_expression(text: str, start: int) -> int:
    depth = 0
    position = start
    while (match := _TOKEN.search(text, position)) is not None:
        token = match.group()
        if token == "}}" and depth <= 0:
            return match.start()
        position = match.end()
        if token in "{[(":
            depth += 1
        elif token in "}])":
            depth -= 1
        elif token == "}}":
            # Two braces of nested mappings, one of which may begin the end mark.
            depth -= 1
            position = match.start() + 1
    raise ExpressionError(f"{brief(text[start - len(_OPEN) :])}: `${{{{` without `}}}}`")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if _OPEN in value:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def expressions(value: Any) -> list[Expression]:
    """Every expression in a nested value, in order."""
    return [piece for text in _texts(value) for piece in pieces(text) if isinstance(piece, Expression)]


def references(value: Any) -> set[tuple[str, ...]]:
    """What the templates in a nested value look up: `("steps", "a", "outputs", "y")`, `("params", "x")`.

    A path ends where the plan does not write it out (`steps.a.outputs[params.x]`). Raises `ExpressionError`.
    """
    found: set[tuple[str, ...]] = set()
    for expression in expressions(value):
        found.update(_read(expression, lambda sandbox, source: sandbox.paths(source)))
    return found


def optional_references(value: Any) -> set[tuple[str, ...]]:
    """Those references that may be missing, because `default` or `is defined` looks at them."""
    found: set[tuple[str, ...]] = set()
    for expression in expressions(value):
        found.update(_read(expression, lambda sandbox, source: sandbox.guarded(source)))
    return found


def _read(expression: Expression, work: Callable[[Any, str], Any]) -> Any:
    # Jinja2 is imported here, because most plans have no template and importing it takes as long as reading them.
    from bridge import sandbox

    try:
        return work(sandbox, expression.source.strip())
    except sandbox.BadExpression as error:
        raise ExpressionError(f"{brief(expression.template, 120)}: {error}") from None


def render(value: Any, scope: Mapping[str, Any]) -> Any:
    """A nested value with every template replaced.

    A text that is one `${{ }}` and nothing else becomes the value itself, of any type; elsewhere a value is put into
    the text, as JSON unless it is a text. Raises `ExpressionError` naming the template and what is missing.
    """
    if isinstance(value, str):
        return _render_text(value, scope) if _OPEN in value else value
    if isinstance(value, Mapping):
        return {key: render(item, scope) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [render(item, scope) for item in value]
    return value


def _evaluate(expression: Expression, scope: Mapping[str, Any]) -> Any:
    return _read(expression, lambda sandbox, source: sandbox.evaluate(source, scope))


def to_text(value: Any) -> str:
    """A rendered value as part of a text: a text as it is, everything else as JSON (`true`, `null`, `[1, 2]`)."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _render_text(text: str, scope: Mapping[str, Any]) -> Any:
    parts = pieces(text)
    if len(parts) == 1 and isinstance(parts[0], Expression):
        return _evaluate(parts[0], scope)
    return _joined(
        [to_text(_evaluate(piece, scope)) if isinstance(piece, Expression) else piece for piece in parts], text
    )


def _joined(parts: list[str], text: str) -> str:
    if sum(map(len, parts)) > MAX_TEXT:
        raise ExpressionError(f"{brief(text)}: the rendered text has more than {MAX_TEXT:,} characters")
    return "".join(parts)


def _render_shell(text: str, scope: Mapping[str, Any]) -> str:
    script = ShellText()
    parts = []
    for piece in pieces(text):
        if isinstance(piece, str):
            script.literal(piece)
            parts.append(piece)
            continue
        value = _evaluate(piece, scope)
        try:
            parts.append(script.inserted(quote(value, to_text)))
        except UnquotablePlace as place:
            raise ExpressionError(unquotable(piece, place)) from None
    return _joined(parts, text)


def unquotable(expression: Expression, place: UnquotablePlace) -> str:
    """The sentence for a template that stands where a shell cannot take data."""
    return f"{brief(expression.template, 120)}: a value cannot be quoted safely in {place} of a shell script"


def check_shell_text(text: str) -> None:
    """Raise `ExpressionError` when a template of a shell script stands where its value could not be quoted."""
    script = ShellText()
    for piece in pieces(text):
        if isinstance(piece, str):
            script.literal(piece)
            continue
        try:
            script.inserted("v")
        except UnquotablePlace as place:
            raise ExpressionError(unquotable(piece, place)) from None


def render_params(model: type[Frozen], params: Mapping[str, Any], scope: Mapping[str, Any]) -> dict[str, Any]:
    """The rendered fields of a step type, ready for `model`.

    What a template puts into a text that a shell parses is quoted: fields of the type `Shell`, and the `-c` script of
    `command` and `args`. Raises `ExpressionError`.
    """
    rendered = {
        name: _render_typed(value, model.model_fields[name].annotation, model.model_fields[name].metadata, scope)
        if name in model.model_fields
        else render(value, scope)
        for name, value in params.items()
    }
    position = script_position(model, params)
    if position is not None:
        rendered["args"][position] = _render_shell(params["args"][position], scope)
    return rendered


def script_position(model: type[Frozen], params: Mapping[str, Any]) -> int | None:
    """Index in `args` of the shell script, for a type with `command` and `args`."""
    args = params.get("args")
    if not {"command", "args"} <= model.model_fields.keys() or not isinstance(args, list):
        return None
    found = shell_script([params.get("command"), *args])
    return found - 1 if found is not None and isinstance(args[found - 1], str) else None


def _render_typed(value: Any, annotation: Any, metadata: list[Any], scope: Mapping[str, Any]) -> Any:
    if not is_template(value):
        return value
    if any(isinstance(mark, _SHELL_MARKER) for mark in metadata):
        return _render_shell(value, scope) if isinstance(value, str) else render(value, scope)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _render_typed(value, arguments[0], list(arguments[1:]), scope)
    if origin in (Union, types.UnionType):
        return _render_typed(value, *_fitting(value, arguments), scope)
    if origin in (list, tuple) and isinstance(value, list):
        return [_render_typed(item, arguments[0], [], scope) for item in value]
    if origin is dict and isinstance(value, Mapping):
        return {key: _render_typed(item, arguments[1], [], scope) for key, item in value.items()}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and isinstance(value, Mapping):
        fields = annotation.model_fields
        return {
            key: _render_typed(item, fields[key].annotation, fields[key].metadata, scope)
            if key in fields
            else render(item, scope)
            for key, item in value.items()
        }
    return _as_text(render(value, scope), annotation)


def _as_text(value: Any, annotation: Any) -> Any:
    """What a template gave, as a text where the model wants one, as it is when written in the plan."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _as_text(value, arguments[0])
    if annotation is str:
        return value if value is None else to_text(value)
    if origin is list and isinstance(value, list):
        return [_as_text(item, arguments[0]) for item in value]
    if origin is dict and isinstance(value, Mapping):
        return {key: _as_text(item, arguments[1]) for key, item in value.items()}
    return value


def _fitting(value: Any, arms: tuple[Any, ...]) -> tuple[Any, list[Any]]:
    """The arm of a union that a value is meant for; of two texts the one that a shell parses."""
    wanted = dict if isinstance(value, Mapping) else list if isinstance(value, list) else str
    for arm in arms:
        bare, metadata = (get_args(arm)[0], list(get_args(arm)[1:])) if get_origin(arm) is Annotated else (arm, [])
        kind = get_origin(bare) or bare
        is_model = isinstance(kind, type) and issubclass(kind, BaseModel)
        if (wanted is str and metadata) or (wanted is not str and kind is wanted) or (wanted is dict and is_model):
            return bare, metadata
    return (str if set(arms) <= {str, type(None)} else Any), []


def shell_texts(model: type[Frozen], params: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Every text of a step that a shell will parse and that has a template, with its path in the params."""
    position = script_position(model, params)
    if position is not None and is_template(params["args"][position]):
        yield ("args", position), params["args"][position]
    for name, value in params.items():
        field = model.model_fields.get(name)
        if field is not None and any(isinstance(mark, _SHELL_MARKER) for mark in field.metadata):
            yield from (((name,), text) for text in _texts(value))
