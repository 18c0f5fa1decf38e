"""Templates: what they render to, what they refuse, and that a value in a shell script stays data in a real shell."""

import contextlib
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.expressions import (
    ExpressionError,
    check_shell_text,
    is_template,
    optional_references,
    pieces,
    references,
    render,
    render_params,
)
from bridge.shell import python_script, shell_script
from steps import Frozen, Shell
from steps._registry import find

SCOPE: dict[str, Any] = {
    "params": {"x": "it's", "n": 3, "flag": True, "nothing": None, "names": ["a", "b c"], "items": 5, "f": 0.5},
    "steps": {"a-b": {"outputs": {"y": {"k": [1, 2]}, "accuracy": 1.5}, "outcome": "succeeded", "exit_code": 0}},
    "env": {"HOME": "/home/me"},
    "matrix": {"m": 7},
    "run": {"id": "r1", "attempt": 1},
}


class Script(Frozen):
    script: Shell = ""
    more: list[Shell] = []
    by_name: dict[str, Shell] = {}
    maybe: Shell | None = None
    plain: str = ""


@pytest.mark.parametrize(
    ("template", "value"),
    [
        ("plain", "plain"),
        ("${{ params.n }}", 3),
        ("${{params.names}}", ["a", "b c"]),
        ("${{ params.items }}", 5),
        ("${{-1}}", -1),
        ("${{ steps['a-b'].outputs.y.k[0] }}", 1),
        ('${{ steps["a-b"].outputs }}', {"y": {"k": [1, 2]}, "accuracy": 1.5}),
        (
            "n=${{ params.n }}, ${{ params.flag }} ${{ params.nothing }} ${{ params.names }}",
            'n=3, true null ["a", "b c"]',
        ),
        ("${{ '}}' }}.", "}}."),
        ("${{ {'a': {'b': 1}}.a.b }}", 1),
        ("${{ {'a': {'b': 1}} }}", {"a": {"b": 1}}),
        ("${{ params.missing | default('d') }}", "d"),
        ("${{ params.n * 2 + 1 }}", 7),
        ("${{ params.names | join('-') ~ params.n }}", "a-b c3"),
        ("${{ 'yes' if params.n > 2 and not params.nothing else 'no' }}", "yes"),
        ("${{ params.names | length }}", 2),
        ("${{ '/a/b.txt' | basename }} ${{ '/a/b.txt' | dirname }}", "b.txt /a"),
        ("${{ [3, 1, 2] | sort | first }}", 1),
        ("${{ ['B', 'a', 'B'] | unique }}", ["B", "a"]),
        ("${{ params.names | tojson }}", '["a", "b c"]'),
        ("${{ 'b c' in params.names }}", True),
        ("${{ params.zzz is defined }}", False),
        ("${{ params.f | round | int }}", 0),
        ("line\r\n${{ params.n }}\r\n", "line\r\n3\r\n"),
        ("$HOME ${HOME} {{ x }} {% x %} {# x #}", "$HOME ${HOME} {{ x }} {% x %} {# x #}"),
        ("${{ params.n }}${{ params.n }}", "33"),
    ],
)
def test_render(template: str, value: Any) -> None:
    assert render(template, SCOPE) == value
    assert type(render(template, SCOPE)) is type(value)


def test_render_goes_through_nested_values_and_leaves_keys_alone() -> None:
    nested = {"${{ a }}": [{"x": "${{ params.n }}"}, 4, None], "t": ("${{ run.id }}",)}
    assert render(nested, SCOPE) == {"${{ a }}": [{"x": 3}, 4, None], "t": ["r1"]}


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("${{ params.y }}", "no `y`"),
        ("${{ parms.x }}", "did you mean `params`"),
        ("${{ steps['a-b'].outputs.acuracy }}", "did you mean `accuracy`"),
        ("${{ params.missing.deeper }}", "no `missing`"),
        ("text ${{ params.y }}", "no `y`"),
        ("${{ 'a' * 10**9 }}", "more than"),
        ("${{ [0] * 10**9 }}", "more than"),
        ("${{ 2 ** 99999999999 }}", "bits"),
        ("${{ 9 ** -99999999999 }}", "bits"),
        ("${{ ('a' * 1000000) ~ 'b' }}", "more than"),
        ("${{ ('a' * 1000000) + 'b' }}", "more than"),
        ("${{ ('a' * 999999) | replace('a', 'bb') }}", "more than"),
        ("${{ '%999999999d' % 1 }}", "numbers only"),
        ("${{ range(5) }}", "functions cannot be called"),
        ("${{ params.x.upper() }}", "functions cannot be called"),
        ("${{ ''.__class__ }}", "no `__class__`"),
        ("${{ params['__class__'] }}", "no `__class__`"),
        ("${{ params | attr('keys') }}", "no filter `attr`"),
        ("${{ params.x | uper }}", "did you mean `upper`"),
        ("${{ params.x is callable }}", "no test `callable`"),
        ("${{ 1 + }}", "unexpected"),
        ("${{ 1 2 }}", "unexpected"),
        ("${{ x", "without `}}`"),
        ("${{ }}", "nothing between"),
        ("${{ " + "(" * 1500 + "1" + ")" * 1500 + " }}", "nested"),
        ("${{ " + "-" * 3500 + "1 }}", "nested"),
        ("${{ " + "1+" * 2500 + "1 }}", "limit"),
        ("${{ 1 / 0 }}", "division"),
        ("${{ 1e300 * 1e300 }}", "finite"),
        ("${{ params.names | sort + 1 }}", "list"),
        ("${{ self }}", "no `self`"),
        ("${{ cycler }}", "no `cycler`"),
    ],
)
def test_what_cannot_be_rendered_names_the_template_and_the_reason(template: str, said: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        render(template, SCOPE)
    assert said in str(caught.value)
    assert str(caught.value).startswith("`")


def test_a_rendered_text_has_a_limit() -> None:
    scope = {**SCOPE, "params": {"big": "x" * 600_000}}
    with pytest.raises(ExpressionError, match="more than"):
        render("${{ params.big }}${{ params.big }}", scope)


def test_references() -> None:
    found = references(
        {"a": ["${{ steps['a'].outputs.y + params[matrix.m] }}", "x ${{ steps[params.q].outputs }}"], "b": "${{ run }}"}
    )
    assert found == {
        ("steps", "a", "outputs", "y"),
        ("params",),
        ("matrix", "m"),
        ("steps",),
        ("params", "q"),
        ("run",),
    }
    assert optional_references("${{ params.a | default(params.b) }} ${{ env.X is defined }}") == {
        ("params", "a"),
        ("env", "X"),
    }


def test_is_template() -> None:
    assert is_template({"a": ["x", {"b": "${{ 1 }}"}]})
    assert not is_template({"${{ key }}": ["$x", 3, None, "{{ x }}"]})


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(alphabet="ab $'\"{}\\\n", max_size=8), min_size=1, max_size=4))
def test_literal_text_is_never_changed(texts: list[str]) -> None:
    literals = [text.replace("${{", "") for text in texts]
    template = "${{ params.n }}".join(literals)
    if template.count("${{") == len(literals) - 1 and len(literals) > 1:
        rendered = render(template, SCOPE)
        assert rendered == "3".join(literals) or template == "${{ params.n }}"


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="pn.x[]()'\"{}|~+-*/%<>=!,: 01aif${}", max_size=40))
def test_any_text_renders_or_is_an_expression_error(source: str) -> None:
    with contextlib.suppress(ExpressionError):
        json.dumps(render("${{ " + source + " }}", SCOPE))


VALUES = ["", "a b", "it's", '"', "$(echo BAD)", "`echo BAD`", "\\", "\\'", "a\nb", "$HOME", "*", "!x", "#x", "é", "-n"]
SCRIPTS = [
    "printf %s ${{ params.v }}",
    'printf %s "${{ params.v }}"',
    "printf %s '${{ params.v }}'",
    'printf %s "$(printf %s ${{ params.v }})"',
    'printf %s "$(printf %s "${{ params.v }}")"',
    "printf %s \"$(printf %s '${{ params.v }}')\"",
    "# don't\nprintf %s ${{ params.v }}",
    'X="${HOME:-it}"; printf %s ${{ params.v }}',
    "x=${#HOME}; printf %s ${{ params.v }}",
    "(printf %s ${{ params.v }})",
    'f() { printf %s "$1"; }; f ${{ params.v }}',
    "x=$((1 + 2)); printf %s ${{ params.v }}",
    "case a in a) printf %s ${{ params.v }};; esac",
    "printf %s \\\"${{ params.v }} | sed '1s/^\"//'",
    'x=${{ params.v }}; printf %s "$x"',
]


def _ran(program: str, script: str) -> str:
    env = {"PATH": os.defpath, "HOME": "/nowhere"}
    return subprocess.run([program, "-c", script], env=env, capture_output=True, timeout=20, check=True).stdout.decode()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_value_in_a_shell_script_is_data_in_a_real_shell(script: str) -> None:
    for program in ("sh", "bash"):
        together = []
        for value in VALUES:
            rendered = render_params(Script, {"script": script}, {"params": {"v": value}})["script"]
            together.append(f"(\n{rendered}\n); printf '\\001'")
        outputs = _ran(program, "\n".join(together)).split("\x01")[:-1]
        # A substitution drops line ends at the end of what it read, and `sed` adds one.
        assert [output.rstrip("\n") for output in outputs] == [value.rstrip("\n") for value in VALUES]


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20))
def test_any_value_is_data_in_a_real_shell(value: str) -> None:
    script = 'printf "%s|" ${{ params.v }} "a ${{ params.v }} b" \'${{ params.v }}\''
    rendered = render_params(Script, {"script": script}, {"params": {"v": value}})["script"]
    assert _ran("sh", rendered).replace("\r\n", "\n") == f"{value}|a {value} b|{value}|".replace("\r\n", "\n")


@pytest.mark.parametrize(
    ("script", "place"),
    [
        ("cat <<EOF\n${{ params.v }}\nEOF", "here-document"),
        ("echo `echo ${{ params.v }}`", "backticks"),
        ("echo ${X:-${{ params.v }}}", "${...}"),
        ("echo $((1 + ${{ params.v }}))", "$((...))"),
        ("echo $'${{ params.v }}'", "$'...'"),
        ("echo \\${{ params.v }}", "after a"),
        ("echo $${{ params.v }}", "after a"),
        ('echo "\\${{ params.v }}"', "after a"),
        ("echo # ${{ params.v }}", "comment"),
        ('X="${HOME:-it\'s}"; echo ${{ params.v }}', "double quotes"),
        ('echo "$(case a in a) echo ${{ params.v }};; esac)"', "case"),
    ],
)
def test_where_no_quoting_is_safe_a_template_is_refused(script: str, place: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        render_params(Script, {"script": script}, {"params": {"v": "x"}})
    assert place in str(caught.value)
    with pytest.raises(ExpressionError):
        check_shell_text(script)


def test_shell_fields_are_quoted_wherever_they_stand_and_others_are_not() -> None:
    scope = {"params": {"v": "a b", "l": ["c d", 1]}}
    params = {
        "script": "run ${{ params.l }}",
        "more": ["x ${{ params.v }}"],
        "by_name": {"k": "${{ params.v }}"},
        "maybe": "${{ params.v }}",
        "plain": "${{ params.v }}",
        "unknown": "${{ params.v }}",
    }
    assert render_params(Script, params, scope) == {
        "script": "run 'c d' 1",
        "more": ["x 'a b'"],
        "by_name": {"k": "'a b'"},
        "maybe": "'a b'",
        "plain": "a b",
        "unknown": "a b",
    }


def test_the_script_of_a_command_is_quoted_and_its_other_arguments_are_not() -> None:
    model = find("command").params
    params = {"command": "bash", "args": ["-lc", "echo ${{ params.v }}", "${{ params.v }}"]}
    rendered = render_params(model, params, {"params": {"v": "a; b"}})
    assert rendered == {"command": "bash", "args": ["-lc", "echo 'a; b'", "a; b"]}
    plain = {"command": "echo", "args": ["-c", "x ${{ params.v }}"]}
    assert render_params(model, plain, {"params": {"v": "a; b"}})["args"] == ["-c", "x a; b"]
    whole = {"command": "ls", "args": "${{ params.v }}"}
    assert render_params(model, whole, {"params": {"v": ["a"]}})["args"] == ["a"]


class Typed(Frozen):
    text: str = ""
    maybe: str | None = None
    count: int = 0
    many: list[str] = []
    by_name: dict[str, str] = {}
    any: int | str = 0


def test_a_number_in_a_template_is_a_text_where_a_text_is_wanted() -> None:
    scope = {"params": {"n": 3, "b": True, "none": None, "list": [1, "x"], "map": {"k": 0.5}}}
    params = {
        "text": "${{ params.n }}",
        "maybe": "${{ params.b }}",
        "count": "${{ params.n }}",
        "many": ["${{ params.n }}", "x${{ params.n }}"],
        "by_name": "${{ params.map }}",
        "any": "${{ params.n }}",
    }
    rendered = render_params(Typed, params, scope)
    assert rendered == {
        "text": "3",
        "maybe": "true",
        "count": 3,
        "many": ["3", "x3"],
        "by_name": {"k": "0.5"},
        "any": 3,
    }
    Typed.model_validate(rendered)
    assert render_params(Typed, {"many": "${{ params.list }}"}, scope) == {"many": ["1", "x"]}
    assert render_params(Typed, {"maybe": "${{ params.none }}"}, scope) == {"maybe": None}


@pytest.mark.parametrize(
    ("argv", "position"),
    [
        (["bash", "-c", "S"], 2),
        (["/bin/sh", "-ec", "S", "x"], 2),
        (["bash", "-euo", "pipefail", "-c", "S"], 4),
        (["bash", "--norc", "-lc", "S"], 3),
        (["bash", "-c", "-e", "S"], 3),
        (["bash", "-c", "--", "S"], 3),
        (["env", "A=1", "zsh", "-c", "S"], 4),
        (["timeout", "5", "dash", "-c", "S"], 4),
        (["bash", "script.sh", "-c", "x"], None),
        (["bash", "-c"], None),
        (["git", "-c", "S"], None),
        (["python", "-c", "S"], None),
    ],
)
def test_shell_script(argv: list[str], position: int | None) -> None:
    assert shell_script(argv) == position


@pytest.mark.parametrize(
    ("argv", "position"),
    [
        (["python", "-c", "S"], 2),
        (["python3.11", "-I", "-X", "dev", "-c", "S"], 5),
        (["python3", "-uc", "S"], 2),
        (["uv", "run", "python", "-c", "S"], 4),
        (["python", "-m", "x", "-c", "S"], None),
        (["python", "x.py", "-c", "S"], None),
    ],
)
def test_python_script(argv: list[str], position: int | None) -> None:
    assert python_script(argv) == position


def test_pieces_keeps_the_source_of_each_expression() -> None:
    assert [str(getattr(piece, "template", piece)) for piece in pieces("a ${{ x }} b")] == ["a ", "${{ x }}", " b"]


def test_reading_a_plan_without_a_template_does_not_import_the_engine() -> None:
    code = (
        "import sys; from pathlib import Path; from bridge.reader import read_plan_text\n"
        "read_plan_text('steps: [{id: a, type: command, command: ls}]', Path('p.yaml'))\n"
        "assert 'jinja2' not in sys.modules, 'jinja2 was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
