"""Shell scripts in a plan: which argument is a `-c` script, and how a value is put into a script as data.

A value is quoted for the place it stands in. Where that cannot be known (a here-document, backticks, `${...}`) it is
refused, because a value that is quoted for the wrong place is code.
"""

import posixpath
import re
import shlex
from collections.abc import Callable, Sequence

_SHELL = re.compile(r"(ba|z|da|k)?sh\Z")
_PYTHON = re.compile(r"python[0-9.]*\Z")
_CASE = re.compile(r"\bcase\b")
_LONG_OPTIONS_WITH_VALUE = ("--rcfile", "--init-file")
_REFUSED = {
    "ansi": "`$'...'`",
    "braces": "`${...}`",
    "arithmetic": "`$((...))`",
    "comment": "a comment",
    "backtick": "backticks",
}


class UnquotablePlace(ValueError):
    """No quoting makes a value safe at this place of the script."""


def shell_script(argv: Sequence[object]) -> int | None:
    """Index of the script in `[bash, -lc, SCRIPT]`, also behind `env`, `sudo` and the like; None when there is none."""
    return _script(argv, _SHELL, _script_of_shell)


def python_script(argv: Sequence[object]) -> int | None:
    """Index of the script in `[python, -c, SCRIPT]`."""
    return _script(argv, _PYTHON, _script_of_python)


def _script(
    argv: Sequence[object], program: re.Pattern[str], find: Callable[[Sequence[object], int], int | None]
) -> int | None:
    for index, word in enumerate(argv):
        if isinstance(word, str) and program.match(posixpath.basename(word)):
            found = find(argv, index + 1)
            if found is not None:
                return found
    return None


def _script_of_shell(argv: Sequence[object], index: int) -> int | None:
    takes_script = False
    while index < len(argv):
        word = argv[index]
        if not isinstance(word, str) or not word.startswith(("-", "+")) or word in ("-", "--"):
            break
        if word.startswith("--"):
            index += 2 if word in _LONG_OPTIONS_WITH_VALUE else 1
            continue
        takes_script = takes_script or "c" in word
        index += 2 if word[-1] in "oO" else 1
    if index < len(argv) and argv[index] in ("-", "--"):
        index += 1
    return index if takes_script and index < len(argv) else None


def _script_of_python(argv: Sequence[object], index: int) -> int | None:
    while index < len(argv):
        word = argv[index]
        if not isinstance(word, str) or not word.startswith("-") or word.startswith("-m"):
            return None
        if not word.startswith("--") and word.endswith("c"):
            return index + 1 if index + 1 < len(argv) else None
        index += 2 if word in ("-W", "-X") else 1
    return None


def quote(value: object, to_text: Callable[[object], str]) -> str:
    """A value as one word of a shell script; a list as one word for each item."""
    if isinstance(value, list):
        return " ".join(shlex.quote(to_text(item)) for item in value)
    return shlex.quote(to_text(value))


class ShellText:
    """Follows a script piece by piece, so that a value can be quoted for the place where it comes."""

    def __init__(self) -> None:
        self._places = ["plain"]
        """Innermost last: plain, double, single, ansi, comment, braces, arithmetic, backtick."""
        self._here_document = False
        self._substitution = False
        self._case = False
        self._ambiguous = False
        self._escaping = False
        self._last = "\n"

    def literal(self, text: str) -> None:
        """Read a piece the plan's author wrote."""
        self._case = self._case or _CASE.search(text) is not None
        index = 0
        while index < len(text):
            index += self._step(text, index)
        self._escaping = index > len(text)

    def inserted(self, quoted: str) -> str:
        """A quoted value, made to fit here. Raises `UnquotablePlace`."""
        place = self._places[-1]
        if self._here_document:
            raise UnquotablePlace("a here-document")
        if self._case and self._substitution:
            raise UnquotablePlace("a script with both `case` and `$(...)`")
        if self._ambiguous:
            raise UnquotablePlace("a script with a `'` inside `${...}` inside double quotes")
        if self._escaping or (place == "plain" and self._last == "$"):
            raise UnquotablePlace("the text after a `\\` or `$`")
        if "backtick" in self._places or place in _REFUSED:
            raise UnquotablePlace(_REFUSED.get(place, "backticks"))
        mark = {"double": '"', "single": "'"}.get(place, "")
        self._last = "v"
        return f"{mark}{quoted}{mark}"

    def _step(self, text: str, index: int) -> int:
        """Read one sign, or some that belong together; return how many."""
        character, place = text[index], self._places[-1]
        before, self._last = self._last, character
        if place == "comment":
            if character == "\n":
                self._places.pop()
            return 1
        if place == "single":
            if character == "'":
                self._places.pop()
            return 1
        if character == "\\":
            self._last = "x"
            return 2
        if place == "ansi":
            if character == "'":
                self._places.pop()
            return 1
        return self._opened(text[index : index + 3]) or self._closed(text[index : index + 2], before)

    def _opened(self, ahead: str) -> int:
        """Signs read when a new place begins here, else 0."""
        place = self._places[-1]
        if ahead == "$((":
            self._places.append("arithmetic")
            self._substitution = True
            return 3
        if ahead[:2] in ("$(", "${"):
            self._places.append("plain" if ahead[1] == "(" else "braces")
            self._substitution = True
            self._last = ahead[1]
            return 2
        if place == "double":
            return 0
        if ahead[:2] == "$'":
            self._places.append("ansi")
            return 2
        if ahead == "<<<":
            return 3
        if ahead[:2] == "<<" and place != "arithmetic":
            self._here_document = True
            return 2
        return 0

    def _closed(self, pair: str, before: str) -> int:
        character, place = pair[0], self._places[-1]
        if character in ('"', "`"):
            self._toggle({'"': "double", "`": "backtick"}[character])
        elif place == "double":
            pass
        elif place == "arithmetic":
            if pair == "))":
                self._places.pop()
                return 2
        elif character == "'":
            # Inside `"${a:-it's}"` it opens a quotation in bash and stands for itself in dash.
            below = next(outer for outer in reversed(self._places) if outer != "braces")
            self._ambiguous = self._ambiguous or (place == "braces" and below == "double")
            self._places.append("single")
        elif character == "}" and place == "braces":
            self._places.pop()
        elif character == "(" and place == "plain":
            self._places.append("plain")
        elif character == ")" and place == "plain" and len(self._places) > 1:
            self._places.pop()
        elif character == "#" and before in " \t\n;&|(" and place == "plain":
            self._places.append("comment")
        return 1

    def _toggle(self, place: str) -> None:
        if self._places[-1] == place:
            self._places.pop()
        else:
            self._places.append(place)
