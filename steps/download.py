"""Download a file over HTTP(S): whole or not at all, resumed where an earlier attempt stopped, checked by sha256."""

import hashlib
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from steps import Context, Frozen, PlanPath, StepError
from steps import Outputs as StepOutputs

_TEMPLATE = "${{"


def _is_http(value: str) -> str:
    if value.startswith(("http://", "https://", _TEMPLATE)):
        return value
    raise ValueError(f"got `{value}`, wanted a URL that starts with `http://` or `https://`")


def _is_sha256(value: str) -> str:
    if _TEMPLATE in value or re.fullmatch(r"([0-9a-fA-F]{64})?", value):
        return value
    raise ValueError(f"got `{value}`, wanted a sha256 of 64 hexadecimal digits")


class Params(Frozen):
    url: Annotated[str, AfterValidator(_is_http)]
    """Address, `http://` or `https://`; redirects are followed."""
    output: PlanPath
    """File to write; its folder is created."""
    sha256: Annotated[str, AfterValidator(_is_sha256)] = ""
    """Expected hash, in hexadecimal. A file that is there and has it is not downloaded again."""
    auth_secret: str = ""
    """Name of a declared secret that is sent as `Authorization: Bearer <value>`."""
    auth_header: str = "Authorization"
    """Header that carries the secret; any other than `Authorization` gets the bare value."""


class Outputs(Frozen):
    path: str
    """Absolute path of the file."""
    sha256: str
    """Hash of the file, lower case."""
    size: int
    """Bytes."""
    downloaded: bool
    """False when the file was already there with the wanted hash."""


def run(params: Params, context: Context) -> StepOutputs:
    from steps._transfer import Transfer

    target = context.plan_dir / params.output
    wanted = params.sha256.lower()
    if target.is_dir():
        raise StepError(f"`{target}` is a folder, wanted the path of a file\n\nhint: add the file name to `output`")
    if wanted and target.is_file() and file_sha256(target, context) == wanted:
        context.log(f"`{target}` is there with the wanted sha256")
        return {"path": str(target), "sha256": wanted, "size": target.stat().st_size, "downloaded": False}
    found = Transfer(params.url, target, wanted, _headers(params, context), context).run()
    return {"path": str(target), "sha256": found, "size": target.stat().st_size, "downloaded": True}


def file_sha256(path: Path, context: Context) -> str:
    """Hash of a file in hexadecimal; ends early when the step is cancelled."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            context.check_cancelled()
            digest.update(chunk)
    return digest.hexdigest()


def _headers(params: Params, context: Context) -> dict[str, str]:
    if not params.auth_secret:
        return {}
    if params.auth_secret not in context.secrets:
        raise StepError(
            f"secret `{params.auth_secret}` of `auth_secret` is not declared\n\n"
            f"hint: add `secrets: [{params.auth_secret}]` to the step"
        )
    value = context.secrets[params.auth_secret]
    bearer = params.auth_header.lower() == "authorization"
    return {params.auth_header: f"Bearer {value}" if bearer else value}
