"""The Docker Engine as steps see it: errors in the step's words, and answers whose reading a cancel ends."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from container.engine import EngineUnreachable, connect
from steps import Context, StepError, StepFailed

if TYPE_CHECKING:
    from docker import DockerClient

_ANSI_RED, _ANSI_END = "\x1b[91m", "\x1b[0m"


@contextlib.contextmanager
def engine(context: Context, timeout_s: int = 60, ends_on_cancel: bool = True) -> Iterator["DockerClient"]:
    """The engine of the step's environment; one request may be silent for `timeout_s`.

    A refused request becomes `StepError`, a broken or missing engine `StepFailed`. With `ends_on_cancel` the answers
    that are being read end when the step is cancelled, which tells the engine to stop what it does for us.
    """
    import requests
    from docker.errors import APIError, DockerException
    from urllib3.exceptions import HTTPError

    try:
        client = connect(context.env, timeout_s)
    except EngineUnreachable as error:
        raise StepFailed(str(error)) from error
    answers: WeakSet[Any] = WeakSet()
    client.api.hooks["response"].append(lambda response, *args, **kwargs: answers.add(response))

    def hang_up() -> None:
        for answer in list(answers):
            # The answer may have been read to its end meanwhile.
            with contextlib.suppress(Exception):
                answer.raw.shutdown()

    if ends_on_cancel:
        context.on_cancel(hang_up)
    try:
        yield client
    except APIError as error:
        context.check_cancelled()
        said = str(error.explanation or error)
        raise (StepError if error.is_client_error() else StepFailed)(f"the Docker Engine says: {said}") from error
    except DockerException as error:
        raise StepError(str(error)) from error
    except (requests.RequestException, HTTPError, OSError) as error:
        context.check_cancelled()
        raise StepFailed(f"lost the Docker Engine: {error}") from error
    finally:
        for answer in list(answers):
            answer.close()
        client.close()


def events(stream: Iterator[dict[str, Any]], context: Context) -> Iterator[dict[str, Any]]:
    """The messages of a build, push or pull, until the engine has said all or the step is cancelled."""
    for event in stream:
        context.check_cancelled()
        yield event
    context.check_cancelled()


class LineLog:
    """Puts pieces of text together to lines of the step's log; what a build writes to stderr goes to `stderr`."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._rest = ""

    def write(self, text: str) -> None:
        """Add a piece; complete lines are logged."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._log(line)

    def close(self) -> None:
        """Log what has no newline yet."""
        if self._rest:
            self._log(self._rest)
        self._rest = ""

    def _log(self, line: str) -> None:
        plain = line.replace(_ANSI_RED, "").replace(_ANSI_END, "").rstrip("\r")
        is_error = _ANSI_RED in line
        if plain or not is_error:
            self._context.log(plain, "stderr" if is_error else "stdout")


class LayerProgress:
    """Progress of the layers of a pull or push, summed."""

    def __init__(self, context: Context, verb: str) -> None:
        self._context = context
        self._verb = verb
        self._layers: dict[str, tuple[int, int]] = {}

    def add(self, event: dict[str, Any]) -> None:
        """Take one message of the engine; changes of state are logged, byte counts are only progress."""
        layer, detail = event.get("id", ""), event.get("progressDetail") or {}
        if detail.get("total"):
            self._layers[layer] = (min(detail.get("current", 0), detail["total"]), detail["total"])
            done, total = (sum(column) for column in zip(*self._layers.values(), strict=True))
            text = f"{self._verb} {done / 1e6:.1f} of {total / 1e6:.1f} MB"
            self._context.heartbeat({"text": text, "fraction": done / total})
        elif status := event.get("status", ""):
            self._context.log(f"{layer}: {status}" if layer else status)
