"""The expression language inside `${{ }}`: Jinja2's sandbox without statements, calls, methods and globals.

What may be computed is bounded (sizes of texts, numbers and lists), and nothing depends on time, chance or the machine.
Imported by `expressions` when the first template is met, because importing Jinja2 costs as much as the rest of a plan.
"""

import json
import math
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2.filters
from jinja2 import nodes
from jinja2.environment import TemplateExpression
from jinja2.exceptions import SecurityError, TemplateError, UndefinedError
from jinja2.lexer import Token
from jinja2.parser import Parser
from jinja2.runtime import StrictUndefined, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bridge.expressions import to_text
from bridge.problems import brief, listed, nearest

MAX_TEXT = 1_000_000
"""Characters of a computed text, and items of a computed list."""
MAX_EXPRESSION = 4000
"""Characters of one expression."""
MAX_BITS = 4096
"""Bits of a computed whole number."""


class BadExpression(Exception):
    """Syntax, a forbidden construct, a missing name, or a value that does not fit. The text is for people."""


class _Missing(StrictUndefined):
    """A name that is not there; using it says which names are."""

    __slots__ = ()

    @property
    def _undefined_message(self) -> str:
        name = str(self._undefined_name)
        known = _names(self._undefined_obj)
        close = nearest(name, known)
        suffix = f"; did you mean `{close}`?" if close else f"; there are {listed(sorted(known))}" if known else ""
        return f"there is no `{name}`{suffix}"


def _names(thing: Any) -> list[str]:
    return [str(key) for key in thing] if isinstance(thing, Mapping) else []


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%", "//", "/", "-"])

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Attributes are keys of mappings, nothing else: values have no methods here."""
        return self.getitem(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, Undefined):
            return obj[argument]
        try:
            if isinstance(obj, Mapping) or (isinstance(obj, Sequence) and isinstance(argument, int)):
                return obj[argument]
        except (KeyError, IndexError, TypeError):
            pass
        return self.undefined(obj=obj, name=argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if operator == "%" and not isinstance(left, int | float):
        raise BadExpression("`%` is for numbers only")
    if operator == "*":
        for text, times in ((left, right), (right, left)):
            if isinstance(text, str | list | tuple) and isinstance(times, int) and len(text) * times > MAX_TEXT:
                raise BadExpression(f"`*` would make more than {MAX_TEXT:,} characters or items")
    if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        _check_length(len(left) + len(right))
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_BITS:
            raise BadExpression(f"`{operator}` would make a number of more than {MAX_BITS} bits")


def _check_length(length: int) -> None:
    if length > MAX_TEXT:
        raise BadExpression(f"the result has more than {MAX_TEXT:,} characters")


def _join(values: Any, separator: str = "") -> str:
    texts = [to_text(_defined(value)) for value in values]
    _check_length(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def _replace(value: Any, old: str, new: str) -> str:
    text = to_text(value)
    _check_length(len(text) + text.count(old) * len(new))
    return text.replace(old, new)


def _defined(value: Any) -> Any:
    if isinstance(value, Undefined):
        str(value)
    return value


def _sort(values: Any, reverse: bool = False) -> list[Any]:
    return sorted(values, reverse=reverse)


def _unique(values: Any) -> list[Any]:
    first: dict[str, Any] = {}
    for value in values:
        first.setdefault(to_text([value]), value)
    return list(first.values())


FILTERS = {
    "basename": lambda value: posixpath.basename(to_text(value)),
    "default": jinja2.filters.do_default,
    "dirname": lambda value: posixpath.dirname(to_text(value)),
    "first": lambda values: next(iter(values), None),
    "float": jinja2.filters.do_float,
    "int": jinja2.filters.do_int,
    "join": _join,
    "last": lambda values: list(values)[-1],
    "length": len,
    "list": list,
    "lower": lambda value: to_text(value).lower(),
    "max": max,
    "min": min,
    "replace": _replace,
    "round": jinja2.filters.do_round,
    "sort": _sort,
    "string": lambda value: to_text(_defined(value)),
    "sum": sum,
    "tojson": lambda value: json.dumps(_defined(value), ensure_ascii=False),
    "trim": lambda value: to_text(value).strip(),
    "unique": _unique,
    "upper": lambda value: to_text(value).upper(),
}
_TESTS = ("defined", "undefined", "none", "string", "number", "boolean", "mapping", "sequence", "in", "odd", "even")
_ENGINE_NAMES = ("self", "super", "loop", "caller", "varargs", "kwargs")
"""Names Jinja2 gives a meaning of its own."""


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    environment = _Environment(undefined=_Missing, autoescape=False, cache_size=0, extensions=())
    environment.globals.clear()
    environment.filters.clear()
    environment.filters.update(FILTERS)
    environment.tests = {name: environment.tests[name] for name in _TESTS}
    return environment


class _ExpressionParser(Parser):
    """Parses the tokens of one expression, which is all the source there is."""


@lru_cache(maxsize=20_000)
def parse(source: str) -> nodes.Expr:
    """The tree of an expression. Raises `BadExpression`."""
    if len(source) > MAX_EXPRESSION:
        raise BadExpression(f"an expression of {len(source):,} characters, the limit is {MAX_EXPRESSION:,}")
    if not source.strip():
        raise BadExpression("nothing between `${{` and `}}`")
    try:
        parser = _ExpressionParser(_environment(), source, state="variable")
        tree = parser.parse_expression()
        if not parser.stream.eos:
            token: Token = parser.stream.current
            raise BadExpression(f"unexpected {brief(token.value)}")
        tree.set_environment(_environment())
        _check_tree(tree)
    except TemplateError as error:
        raise BadExpression(str(error.message or error)) from None
    except RecursionError:
        raise BadExpression("nested too deeply") from None
    return tree


def _check_tree(tree: nodes.Expr) -> None:
    for node in _walk(tree):
        if isinstance(node, nodes.Call):
            known = listed(sorted(FILTERS), 30)
            raise BadExpression(f"functions cannot be called; use a filter: {known}")
        if isinstance(node, nodes.Name) and node.name in _ENGINE_NAMES:
            raise BadExpression(f"there is no `{node.name}`")
        if isinstance(node, nodes.Filter) and node.name not in FILTERS:
            close = nearest(node.name, FILTERS)
            known = f"did you mean `{close}`?" if close else f"there are {listed(sorted(FILTERS), 30)}"
            raise BadExpression(f"there is no filter `{node.name}`; {known}")
        if isinstance(node, nodes.Test) and node.name not in _TESTS:
            raise BadExpression(f"there is no test `{node.name}`; there are {listed(_TESTS, 30)}")


def _walk(tree: nodes.Node) -> Iterator[nodes.Node]:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(node.iter_child_nodes())


@lru_cache(maxsize=20_000)
def _compiled(source: str) -> TemplateExpression:
    tree = parse(source)
    environment = _environment()
    # `a ~ b` is compiled to a plain join of any size; the filter of the same meaning is bounded.
    joined = _bounded_concat(tree)
    body: list[nodes.Node] = [nodes.Assign(nodes.Name("result", "store"), joined, lineno=1)]
    try:
        template = environment.from_string(nodes.Template(body, lineno=1))
    except (SyntaxError, RecursionError, MemoryError):
        raise BadExpression("nested too deeply") from None
    except TemplateError as error:
        raise BadExpression(str(error.message or error)) from None
    return TemplateExpression(template, undefined_to_none=False)


def _bounded_concat(node: Any) -> Any:
    for name, value in list(node.iter_fields()):
        if isinstance(value, nodes.Node):
            setattr(node, name, _bounded_concat(value))
        elif isinstance(value, list):
            setattr(node, name, [_bounded_concat(item) if isinstance(item, nodes.Node) else item for item in value])
    if isinstance(node, nodes.Concat):
        pieces = nodes.List(node.nodes, lineno=node.lineno)
        node = nodes.Filter(pieces, "join", [], [], None, None, lineno=node.lineno)
        node.set_environment(_environment())
    return node


def evaluate(source: str, scope: Mapping[str, Any]) -> Any:
    """The value of an expression. Raises `BadExpression`."""
    compiled = _compiled(source)
    try:
        value = compiled(**{str(name): part for name, part in scope.items()})
        if isinstance(value, Undefined):
            str(value)
    except BadExpression:
        raise
    except UndefinedError as error:
        if not _uses_known_root(source, scope):
            raise BadExpression(_unknown_root(source, scope)) from None
        raise BadExpression(str(error.message)) from None
    except SecurityError as error:
        raise BadExpression(str(error)) from None
    except (TypeError, ValueError, KeyError, IndexError, ArithmeticError, RecursionError, AttributeError) as error:
        raise BadExpression(f"{error}") from None
    return _plain(value)


def _plain(value: Any) -> Any:
    """JSON only: what leaves an expression travels through Temporal."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise BadExpression(f"the result is {value}, wanted a finite number")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise BadExpression(f"the result is a {type(value).__name__}, wanted a text, number, list or mapping")


def _uses_known_root(source: str, scope: Mapping[str, Any]) -> bool:
    return all(path[0] in scope for path in paths(source))


def _unknown_root(source: str, scope: Mapping[str, Any]) -> str:
    name = next(path[0] for path in sorted(paths(source)) if path[0] not in scope)
    close = nearest(name, scope)
    return f"there is no `{name}`; " + (f"did you mean `{close}`?" if close else f"there are {listed(sorted(scope))}")


@lru_cache(maxsize=20_000)
def paths(source: str) -> frozenset[tuple[str, ...]]:
    """Every name an expression looks up, as far as written out: `steps["a"].outputs.y` is `(steps, a, outputs, y)`."""
    found: set[tuple[str, ...]] = set()
    waiting: list[nodes.Node] = [parse(source)]
    while waiting:
        node = waiting.pop()
        path, rest = _chain(node)
        if path:
            found.add(path)
            waiting.extend(rest)
        else:
            waiting.extend(node.iter_child_nodes())
    return frozenset(found)


def guarded(source: str) -> frozenset[tuple[str, ...]]:
    """The names that may be missing, because `default`, `is defined` or `is undefined` looks at them."""
    found: set[tuple[str, ...]] = set()
    for node in _walk(parse(source)):
        optional = isinstance(node, nodes.Filter) and node.name == "default"
        if optional or (isinstance(node, nodes.Test) and node.name in ("defined", "undefined")):
            path, _ = _chain(node.node)  # type: ignore[attr-defined]
            found.add(path)
    return frozenset(found)


def _chain(node: nodes.Node) -> tuple[tuple[str, ...], list[nodes.Node]]:
    """`a.b["c"]` as a path, with the parts of it that are expressions of their own (`a[x]`: up to `a`, and `x`)."""
    links: list[nodes.Node] = []
    while isinstance(node, nodes.Getattr | nodes.Getitem):
        links.append(node)
        node = node.node
    if not isinstance(node, nodes.Name):
        return (), []
    path = [node.name]
    rest: list[nodes.Node] = []
    written_out = True
    for link in reversed(links):
        if isinstance(link, nodes.Getattr):
            part: Any = link.attr
        elif isinstance(link, nodes.Getitem) and isinstance(link.arg, nodes.Const):
            part = link.arg.value
        else:
            written_out = False
            rest.extend(link.iter_child_nodes(exclude=("node",)))
            continue
        if written_out:
            path.append(str(part))
    return tuple(path), rest
