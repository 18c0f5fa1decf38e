"""The Docker Engine for commands: what it and its images refuse becomes a `Failure`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from bridge.cli.failure import Failure, Unreachable

if TYPE_CHECKING:
    from docker import DockerClient


@contextmanager
def engine() -> Iterator["DockerClient"]:
    """A client of this environment's engine; closed at the end."""
    import requests
    from docker.errors import APIError, DockerException

    from container.engine import EngineUnreachable, connect
    from container.image_spec import ImageError
    from container.launch import LaunchError

    try:
        client = connect(os.environ)
    except EngineUnreachable as error:
        raise Unreachable(str(error)) from error
    try:
        yield client
    except (ImageError, LaunchError) as error:
        raise Failure(str(error)) from error
    except APIError as error:
        raise Failure(f"the Docker Engine says: {error.explanation or error}") from error
    except (DockerException, requests.RequestException) as error:
        raise Unreachable(f"lost the Docker Engine: {error}") from error
    finally:
        client.close()


def say(line: str) -> None:
    """Progress, for people: stdout belongs to what was asked for."""
    click.echo(line, err=True)
