"""`orchestrate secret` and `orchestrate key`: what a plan may name and what Temporal may not read.

A secret is a file of its own (0600) in the state directory; a value comes from stdin or a hidden prompt, never from
argv, and is never printed. Steps find it by name, see `steps._secrets`.
"""

import json
import re
import sys
from pathlib import Path

import click

from bridge.payload_keys import KEYS_VARIABLE, PayloadKeyError, new_key_line, read_keys
from bridge.state import State, StateError, private_dir, write_private

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
MAX_VALUE_BYTES = 96 * 1024
"""A secret becomes an environment variable, which Linux limits to 128 KiB with its name."""


@click.group()
def secret() -> None:
    """Secrets that plans use by name."""


@secret.command("set")
@click.argument("name")
def set_secret(name: str) -> None:
    """Store the secret NAME: its value is read from stdin, or asked for.

    Example: orchestrate secret set HF_TOKEN < token.txt
    """
    path = _path(name)
    if sys.stdin.isatty():
        value = click.prompt(f"Value of {name}", hide_input=True, confirmation_prompt=True)
    else:
        value = _read_stdin(name)
    if not value.removesuffix("\n"):
        raise click.UsageError(f"the value of `{name}` is empty\n\nhint: orchestrate secret set {name} < FILE")
    if "\0" in value:
        raise click.UsageError(f"the value of `{name}` contains a zero byte, which no environment variable can hold")
    try:
        private_dir(path.parent)
        write_private(path, value)
    except (OSError, StateError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"secret `{name}` is set")


@secret.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of names.")
def list_secrets(as_json: bool) -> None:
    """Print the names of the secrets, never their values."""
    folder = State.from_environment().secrets_dir
    paths = folder.iterdir() if folder.is_dir() else ()
    names = sorted(path.name for path in paths if path.is_file() and _NAME.fullmatch(path.name))
    if as_json:
        click.echo(json.dumps(names))
    else:
        click.echo("".join(f"{name}\n" for name in names), nl=False)


@secret.command("remove")
@click.argument("name")
def remove_secret(name: str) -> None:
    """Forget the secret NAME."""
    try:
        _path(name).unlink()
    except FileNotFoundError:
        raise click.UsageError(f"there is no secret `{name}`\n\nhint: orchestrate secret list") from None
    except OSError as error:
        raise click.ClickException(f"secret `{name}` cannot be removed: {error}") from error
    click.echo(f"secret `{name}` is removed")


@click.group()
def key() -> None:
    """Keys that encrypt what Temporal stores."""


@key.command("new")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--id", "key_id", default="", help="Name of the key; today's date and four digits by default.")
def new_key(file: Path, key_id: str) -> None:
    """Write a fresh key as the first line of FILE; keys that are there stay, to decrypt what they encrypted.

    Client and workers use the file that $ORCHESTRATE_PAYLOAD_KEYS names.
    """
    try:
        line = new_key_line(key_id)
        older = read_keys(file) if file.exists() else {}
        added = line.partition(":")[0]
        if added in older:
            raise PayloadKeyError(f"`{file}` already has a key `{added}`\n\nhint: give another with `--id`")
        write_private(file, line + (file.read_text() if older else ""))
    except (OSError, PayloadKeyError) as error:
        raise click.UsageError(str(error)) from error
    click.echo(f"key `{added}` is the first in `{file}`")
    if not older:
        click.echo(f"hint: export {KEYS_VARIABLE}={file.absolute()}", err=True)


COMMANDS: tuple[click.Command, ...] = (secret, key)
"""What `orchestrate` adds to its commands."""


def _path(name: str) -> Path:
    path = State.from_environment().secrets_dir / name
    if not _NAME.fullmatch(name):
        raise click.UsageError(
            f"secret name is `{name}`, wanted a letter or `_`, then letters, digits, `_`, `.` or `-`\n\n"
            "hint: the value is read from stdin, it is no argument"
        )
    if path.is_dir():
        raise click.UsageError(f"`{name}` is a folder beside the secrets, wanted another name")
    return path


def _read_stdin(name: str) -> str:
    data = sys.stdin.buffer.read(MAX_VALUE_BYTES + 1)
    if len(data) > MAX_VALUE_BYTES:
        raise click.UsageError(f"the value of `{name}` is larger than {MAX_VALUE_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise click.UsageError(f"the value of `{name}` is not UTF-8 text\n\nhint: encode it, e.g. as base64") from None
