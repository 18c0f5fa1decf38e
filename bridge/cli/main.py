"""The `orchestrate` command: a table of commands, each loaded from its module when it is used.

`orchestrate PLAN.yaml` is `orchestrate run PLAN.yaml`.
"""

import importlib
import os
import sys
import traceback
from typing import Any

import click

from bridge.cli.failure import INTERRUPTED, Failure, Unreachable

GROUPS = {
    "bridge.cli.run": ("run",),
    "bridge.cli.runs": ("runs", "show", "attach", "cancel", "retry", "explain"),
    "bridge.cli.logs": ("logs",),
    "bridge.cli.plan": ("validate", "graph", "schema", "steps"),
    "bridge.cli.job": ("job",),
    "bridge.cli.services": ("up", "down", "status"),
    "bridge.cli.cluster": ("cluster",),
    "bridge.cli.worker": ("worker",),
    "bridge.cli.secret": ("secret", "key"),
    "bridge.cli.container": ("container",),
    "bridge.cli.spack": ("spack",),
    "bridge.cli.rl": ("rl",),
}
"""Module -> the commands in its `COMMANDS`, in the order of `--help`."""

DEFAULT = "run"
DEBUG = "ORCHESTRATE_DEBUG"
"""Environment variable; when set, an unexpected error shows where it came from."""


class Orchestrate(click.Group):
    """Loads only the command that is used, and runs a plan when the first word is none."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command, in the order of the table."""
        return [name for names in GROUPS.values() for name in names]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name, its module imported now."""
        for module, names in GROUPS.items():
            if cmd_name in names:
                commands: tuple[click.Command, ...] = importlib.import_module(module).COMMANDS
                return next(command for command in commands if command.name == cmd_name)
        return None

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `run` before what is no command."""
        own = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        if args and args[0] not in own and args[0] not in self.list_commands(ctx):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


def _print_version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"orchestrate {version('sygaldry-ray')}")
        ctx.exit()


@click.group(
    cls=Orchestrate,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    subcommand_metavar="PLAN.yaml | COMMAND [ARGS]...",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
def orchestrate() -> None:
    """Run YAML plans durably: `orchestrate PLAN.yaml`.

    The services it needs (Temporal, a worker, Ray) are started on this machine unless `--address` or TEMPORAL_ADDRESS
    names others.
    """


def main(args: list[str] | None = None) -> int:
    """Run one command; its exit code. Every error is one message, with a hint where there is one."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        result: Any = orchestrate.main(args=args, prog_name="orchestrate", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.UsageError as error:
        _show_usage_error(error)
        return error.exit_code
    except click.ClickException as error:
        _debug()
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except Exception as error:
        if os.environ.get(DEBUG):
            traceback.print_exc()
            return Unreachable.exit_code
        Unreachable(f"unexpected {type(error).__name__}: {error}", f"set `{DEBUG}=1` to see where it came from").show()
        return Unreachable.exit_code
    return result if isinstance(result, int) else 0


def _debug() -> None:
    """Where the error being handled came from, for who asked to know."""
    if os.environ.get(DEBUG):
        import traceback

        traceback.print_exc()


def _show_usage_error(error: click.UsageError) -> None:
    """As every other error: what was wrong, then where to look."""
    command = error.ctx.command_path if error.ctx else "orchestrate"
    message = error.format_message()
    hint = "" if "hint:" in message else f"`{command} --help`"
    Failure(message, hint).show()


if __name__ == "__main__":
    sys.exit(main())
