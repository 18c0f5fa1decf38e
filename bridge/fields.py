"""Data of a plan file -> what a model wants, led by the model's types: `convert`, then `validate`.

Conversion drops empty (`null`) and unknown keys, and takes numbers as they are written where a text is wanted, because
old plans rely on it (`3.10` stays `3.10`). Validation turns every pydantic error into a `Finding` with its path.
"""

import types
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from bridge.document import Node
from bridge.problems import Finding, Path, describe, listed, nearest, nearest_hint

DROP: Any = object()
"""The value was refused, and reported."""

Report = Callable[[Finding], None]
Converter = Callable[[Any, "Node | None", Path, Report], Any]

_WANTED = {
    "string_type": "a text",
    "string_sub_type": "a text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "`true` or `false`",
    "bool_parsing": "`true` or `false`",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


def convert(model: type[BaseModel], value: Any, node: Node | None, path: Path, report: Report) -> Any:
    """`value` ready for `model`; what was refused is reported and left out."""
    return _converter(model)(value, node, path, report)


def validate(model: type[BaseModel], data: Any, path: Path) -> tuple[Any, list[Finding]]:
    """The model instance, or None and what is wrong."""
    try:
        return model.model_validate(data), []
    except ValidationError as error:
        return None, _findings(model, data, path, error)


@lru_cache(maxsize=512)
def _converter(annotation: Any) -> Converter:
    if get_origin(annotation) is Annotated:
        return _converter(get_args(annotation)[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _model_converter(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _union_converter(arguments)
    if origin is list:
        return _list_converter(arguments[0])
    if origin is dict:
        return _dict_converter(arguments[1])
    if annotation is str:
        return _text
    if annotation in (int, float):
        return _number
    return _same


def _same(value: Any, node: Node | None, path: Path, report: Report) -> Any:
    return value


def _text(value: Any, node: Node | None, path: Path, report: Report) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return node.text if node is not None and node.text is not None else str(value)
    return value


def _number(value: Any, node: Node | None, path: Path, report: Report) -> Any:
    if isinstance(value, bool):
        report(Finding(path, f"`{_last(path)}`: got {describe(value)}, wanted a number"))
        return DROP
    return value


def _text_item(value: Any, node: Node | None, path: Path, report: Report) -> Any:
    """In lists and maps `true` and nothing are texts as well: `env: {DEBUG: true, EMPTY: }`."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return node.text if node is not None and node.text is not None else str(value).lower()
    return _text(value, node, path, report)


def _item_converter(annotation: Any) -> Converter:
    inner = _converter(annotation)
    return _text_item if inner is _text else inner


def _list_converter(annotation: Any) -> Converter:
    item = _item_converter(annotation)

    def convert_list(value: Any, node: Node | None, path: Path, report: Report) -> Any:
        if not isinstance(value, list) or item is _same:
            return value
        converted = (
            item(entry, node.child(index) if node else None, (*path, index), report)
            for index, entry in enumerate(value)
        )
        return [entry for entry in converted if entry is not DROP]

    return convert_list


def _dict_converter(annotation: Any) -> Converter:
    item = _item_converter(annotation)

    def convert_dict(value: Any, node: Node | None, path: Path, report: Report) -> Any:
        if not isinstance(value, dict) or item is _same:
            return value
        converted = {
            key: item(entry, node.child(key) if node else None, (*path, key), report) for key, entry in value.items()
        }
        return {key: entry for key, entry in converted.items() if entry is not DROP}

    return convert_dict


def _union_converter(arms: tuple[Any, ...]) -> Converter:
    arms = tuple(get_args(arm)[0] if get_origin(arm) is Annotated else arm for arm in arms if arm is not type(None))
    if len(arms) == 1:
        return _converter(arms[0])
    mappings = [
        arm for arm in arms if get_origin(arm) is dict or (isinstance(arm, type) and issubclass(arm, BaseModel))
    ]
    lists = [arm for arm in arms if get_origin(arm) is list]
    of_mapping = _converter(mappings[0]) if mappings else _same
    of_list = _converter(lists[0]) if lists else _same
    only_text = str in arms and int not in arms and float not in arms
    of_scalar = _text if only_text else _number if int in arms and bool not in arms else _same

    def convert_union(value: Any, node: Node | None, path: Path, report: Report) -> Any:
        chosen = of_mapping if isinstance(value, dict) else of_list if isinstance(value, list) else of_scalar
        return chosen(value, node, path, report)

    return convert_union


def _model_converter(model: type[BaseModel]) -> Converter:
    # Looked up when first used: `Condition` contains itself.
    fields: dict[str, tuple[Converter, bool]] = {}

    def convert_model(value: Any, node: Node | None, path: Path, report: Report) -> Any:
        if not isinstance(value, dict):
            return value
        if not fields:
            fields.update(
                (name, (_converter(_annotation(field)), field.annotation is Any))
                for name, field in model.model_fields.items()
            )
        converted = {}
        for key, entry in value.items():
            if key not in fields:
                report(unknown_key((*path, key), fields))
                continue
            field, takes_anything = fields[key]
            if entry is None and not takes_anything:
                continue
            result = field(entry, node.child(key) if node else None, (*path, key), report)
            if result is not DROP:
                converted[key] = result
        return converted

    return convert_model


def _annotation(field: Any) -> Any:
    return field.annotation


def unknown_key(path: Path, known: Any, hint: str = "") -> Finding:
    """The finding for a key that a model does not have."""
    key = str(path[-1])
    hint = hint or nearest_hint(key, list(known), "known keys")
    where = f" in `{_last(path[:-1])}`" if len(path) > 1 else ""
    return Finding(path, f"unknown key `{key}`{where}", hint, at_key=True)


def _findings(model: type[BaseModel], data: Any, path: Path, error: ValidationError) -> list[Finding]:
    """One finding for each place: the arms of a union that failed at one place are one fault."""
    by_place: dict[Path, list[tuple[Path, Any]]] = {}
    for detail in error.errors(include_url=False):
        place, union = _place(data, detail["loc"], detail["type"] == "missing")
        by_place.setdefault(union if union is not None else place, []).append((place, detail))
    findings = []
    for place, details in by_place.items():
        deepest = max(len(found) for found, _ in details)
        if deepest > len(place):
            # The arm of the union that got furthest is the one that was meant.
            for found, detail in details:
                if len(found) == deepest:
                    findings.append(_finding(model, path, found, [detail], data))
        else:
            findings.append(_finding(model, path, place, [detail for _, detail in details], data))
    unique = {(finding.path, finding.message): finding for finding in findings}
    return list(unique.values())


def _place(data: Any, location: tuple[str | int, ...], missing: bool) -> tuple[Path, Path | None]:
    """The path in the data, and the place of the first union on the way: pydantic puts names of union arms between."""
    path: list[str | int] = []
    union: Path | None = None
    for depth, part in enumerate(location):
        if isinstance(data, dict) and (part in data or (missing and depth == len(location) - 1)):
            path.append(part)
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            path.append(part)
            data = data[part]
        elif union is None:
            union = tuple(path)
    return tuple(path), union


def _finding(model: type[BaseModel], prefix: Path, place: Path, details: list[Any], data: Any) -> Finding:
    detail = details[0]
    path = (*prefix, *place)
    kind = detail["type"]
    where = _last(path)
    if kind == "missing":
        inside = f" in `{_last(path[:-1])}`" if len(path) > 1 else ""
        return Finding(path, f"missing `{path[-1]}`{inside}")
    if kind == "extra_forbidden":
        known = list(model.model_fields) if len(place) == 1 else []
        return unknown_key(path, known)
    value = data
    for part in place:
        value = value[part]
    wanted = list(dict.fromkeys(_wanted(one) for one in details))
    if kind == "value_error":
        return Finding(path, f"`{where}`: {detail['ctx']['error']}")
    hint = ""
    if kind == "literal_error":
        close = nearest(str(value), [word.strip("`") for word in wanted[0].removeprefix("one of ").split(", ")])
        hint = f"did you mean `{close}`?" if close else ""
    elif kind == "list_type" and isinstance(value, str) and len(details) == 1:
        hint = f"write `[{value}]`" if len(value) < 40 else "write a list: `[...]`"
    elif kind == "string_type" and isinstance(value, bool):
        hint = f'quote it: `"{str(value).lower()}"`'
    return Finding(path, f"`{where}`: got {describe(value)}, wanted {' or '.join(wanted)}", hint)


def _wanted(detail: Any) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _WANTED:
        return _WANTED[kind]
    if kind == "literal_error":
        words = literal_words(context["expected"])
        return f"one of {listed(words)}" if len(words) > 1 else listed(words)
    if kind == "greater_than_equal":
        return f"at least {context['ge']:g}"
    if kind == "greater_than":
        return f"more than {context['gt']:g}"
    if kind == "less_than_equal":
        return f"at most {context['le']:g}"
    if kind == "too_short":
        return f"at least {context['min_length']} of them"
    message = str(detail["msg"])
    return message[:1].lower() + message[1:]


def literal_words(expected: str) -> list[str]:
    """Pydantic's `'a', 'b' or 'c'` as a list."""
    return [word.strip().strip("'") for word in expected.replace(" or ", ", ").split(", ")]


def _last(path: Path) -> str:
    """The end of a path that says enough to a reader: the key, with its index if it is an item of a list."""
    keys = [part for part in path if isinstance(part, str)]
    if not path:
        return "plan"
    tail = "".join(f"[{part}]" for part in path[len(path) - _trailing_ints(path) :])
    return f"{keys[-1]}{tail}" if keys else tail


def _trailing_ints(path: Path) -> int:
    count = 0
    for part in reversed(path):
        if not isinstance(part, int):
            break
        count += 1
    return count
