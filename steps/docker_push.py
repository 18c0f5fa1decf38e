"""Push an image to its registry; its digest there is an output."""

import base64
import binascii
import json
from typing import Any

from steps import Context, Frozen, StepError, StepFailed
from steps import Outputs as StepOutputs

_FINAL = (
    "denied",
    "unauthorized",
    "authentication required",
    "no basic auth credentials",
    "does not exist locally",
    "invalid reference",
    "insufficient_scope",
)

drives_engine = True


class Params(Frozen):
    image: str
    """Name and tag of a local image; the name says which registry."""
    registry_secret: str = ""
    """Name of a declared secret: `user:password`, or the JSON of a Docker login. By default the logins of the node."""


class Outputs(Frozen):
    image: str
    """Name and tag."""
    digest: str
    """`name@sha256:...`, which names exactly this content in the registry."""


def run(params: Params, context: Context) -> StepOutputs:
    from docker.utils import parse_repository_tag

    from steps._docker import LayerProgress, engine, events

    repository, tag = parse_repository_tag(params.image)
    login = _login(params, context, repository)
    digest = ""
    # A registry may be silent for minutes while it stores a large layer.
    with engine(context, timeout_s=900) as client:
        layers = LayerProgress(context, "pushing")
        for event in events(
            client.api.push(repository, tag or "latest", stream=True, decode=True, auth_config=login), context
        ):
            if "error" in event:
                raise _failure(str(event["error"]), params)
            digest = (event.get("aux") or {}).get("Digest", digest)
            layers.add(event)
    if not digest:
        raise StepFailed(f"the registry of `{params.image}` gave no digest")
    return {"image": params.image, "digest": f"{repository}@{digest}"}


def _failure(said: str, params: Params) -> StepError:
    message = f"`{params.image}` was not pushed: {said}"
    if "does not exist locally" in said:
        return StepError(f"{message}\n\nhint: build it first, under exactly this name")
    if any(word in said.lower() for word in _FINAL):
        wanted = (
            "the login has no right to push there" if params.registry_secret else "give a login by `registry_secret`"
        )
        return StepError(f"{message}\n\nhint: {wanted}")
    return StepFailed(message)


def _login(params: Params, context: Context, repository: str) -> dict[str, Any] | None:
    """The login to send, None to use those of the node. The secret's text is never part of an error."""
    name = params.registry_secret
    if not name:
        return None
    if name not in context.secrets:
        raise StepError(
            f"secret `{name}` of `registry_secret` is not declared\n\nhint: add `secrets: [{name}]` to the step"
        )
    text = context.secrets[name].strip()
    login = _from_json(text, repository) if text.startswith("{") else _from_pair(text)
    if login is None:
        raise StepError(
            f"secret `{name}` is not a login for `{repository}`\n\n"
            'hint: wanted `user:password`, `{"username": ..., "password": ...}` or the text of a Docker `config.json`'
        )
    return login


def _from_pair(text: str) -> dict[str, Any] | None:
    user, colon, password = text.partition(":")
    return {"username": user, "password": password} if colon and user else None


def _from_json(text: str, repository: str) -> dict[str, Any] | None:
    try:
        data: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError:
        return None
    if "auths" in data:
        host = _registry(repository)
        entry = next((value for key, value in data["auths"].items() if _host_of(key) == host), None)
        data = entry if isinstance(entry, dict) else {}
    if "auth" in data:
        try:
            return _from_pair(base64.b64decode(data["auth"], validate=True).decode())
        except (binascii.Error, UnicodeDecodeError):
            return None
    return data if "username" in data or "identitytoken" in data else None


def _registry(repository: str) -> str:
    first, slash, _ = repository.partition("/")
    is_host = bool(slash) and ("." in first or ":" in first or first == "localhost")
    return first if is_host else "index.docker.io"


def _host_of(key: str) -> str:
    return key.partition("://")[2].partition("/")[0] if "://" in key else key.partition("/")[0]
