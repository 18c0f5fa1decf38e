"""How a command ends when it cannot do what was asked: one message, a hint, an exit code."""

from typing import IO, Any

import click

FAILED, INVALID, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130
"""The plan failed; the plan or the usage is invalid; a service was not reached; cancelled or interrupted."""


class Failure(click.ClickException):
    """The plan or the usage is invalid. What went wrong, for people: what, where, got, wanted."""

    exit_code = INVALID

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}\n\nhint: {hint}" if hint else message)

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message to stderr."""
        label = click.style("error", fg="red", bold=True)
        click.echo(f"{label}: {self.format_message()}", file=file, err=file is None)


class Unreachable(Failure):
    """A service could not be reached or started."""

    exit_code = UNREACHABLE
