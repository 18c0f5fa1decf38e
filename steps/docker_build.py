"""Build a container image from a Dockerfile, with the build's output in the step's log."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps import Context, Frozen, PlanPath, StepError, StepFailed
from steps import Outputs as StepOutputs

if TYPE_CHECKING:
    from docker import DockerClient

_INSTRUCTION = re.compile(r"Step (\d+)/(\d+) : (.*)", re.DOTALL)

drives_engine = True


class Params(Frozen):
    image: str
    """Name and tag of the image to make."""
    context: PlanPath = "."
    """Folder sent to the engine, without what its `.dockerignore` names."""
    dockerfile: str = ""
    """The Dockerfile, relative to the plan's folder or else to `context`; by default `Dockerfile` in `context`."""
    platform: str = ""
    """Such as `linux/amd64`; the engine's own by default."""
    target: str = ""
    """Stage to stop at."""
    build_args: dict[str, str] = {}
    """Values for `ARG`. They stay in the image's history, so a secret is refused."""
    labels: dict[str, str] = {}
    """Labels of the image."""
    network: str = ""
    """Network of `RUN`: `host` where containers have no name service of their own, `none`, or a network's name."""
    cache_from: list[str] = []
    """Images whose layers may be used."""
    pull: bool = False
    """Ask the registry for newer base images."""


class Outputs(Frozen):
    image: str
    """Name and tag."""
    image_id: str
    """`sha256:...` of the image on this engine."""
    digest: str
    """`name@sha256:...` when a registry gave the image one, else the image id; both pin the exact content."""


def run(params: Params, context: Context) -> StepOutputs:
    from steps._docker import engine

    folder = context.plan_dir / params.context
    if not folder.is_dir():
        raise StepError(f"build context `{folder}` is not a folder")
    dockerfile = _dockerfile(params, context.plan_dir, folder)
    _refuse_secrets(params, context)
    with engine(context) as client:
        _build(client, params, context, folder, dockerfile)
        image = client.images.get(params.image)
        known: list[str] = image.attrs.get("RepoDigests") or []
        name = params.image.rpartition(":")[0] if ":" in params.image.rpartition("/")[2] else params.image
        digest = next((entry for entry in sorted(known) if entry.startswith(f"{name}@")), str(image.id))
        return {"image": params.image, "image_id": str(image.id), "digest": digest}


def code_files(params: Params, plan_dir: Path) -> list[Path]:
    """The Dockerfile and what of the context is sent to the engine."""
    from docker.utils import exclude_paths

    folder = plan_dir / params.context
    if not folder.is_dir():
        return []
    ignore = folder / ".dockerignore"
    lines = [line.strip() for line in ignore.read_text().splitlines()] if ignore.is_file() else []
    sent = exclude_paths(str(folder), [line for line in lines if line and not line.startswith("#")])
    dockerfiles = [plan_dir / params.dockerfile, folder / params.dockerfile] if params.dockerfile else []
    files = [*dockerfiles[:1], *(folder / name for name in sorted(sent))]
    return [path for path in dict.fromkeys(files) if path.is_file()]


def _build(client: "DockerClient", params: Params, context: Context, folder: Path, dockerfile: Path) -> None:
    from steps._docker import LayerProgress, LineLog, events

    stream = client.api.build(
        path=str(folder),
        dockerfile=str(dockerfile),
        tag=params.image,
        buildargs=dict(sorted(params.build_args.items())),
        labels=dict(sorted(params.labels.items())),
        platform=params.platform or None,
        target=params.target or None,
        network_mode=params.network or None,
        cache_from=params.cache_from or None,
        pull=params.pull,
        rm=True,
        forcerm=True,
        decode=True,
    )
    log, layers, instruction = LineLog(context), LayerProgress(context, "pulling"), ""
    for event in events(stream, context):
        text = event.get("stream", "")
        if found := _INSTRUCTION.match(text):
            instruction = f"`{found[3].strip()}` (step {found[1]} of {found[2]})"
            number, total = int(found[1]), int(found[2])
            context.heartbeat({"text": f"step {number} of {total}", "fraction": (number - 1) / total})
        if "error" in event:
            log.close()
            raise _failure(event, instruction, params.image)
        if "status" in event:
            layers.add(event)
        log.write(text)
    log.close()


def _failure(event: dict[str, Any], instruction: str, image: str) -> StepFailed:
    detail = event.get("errorDetail") or {}
    code = detail.get("code")
    if code is not None and instruction:
        return StepFailed(f"building `{image}`: {instruction} ended with exit code {code}", code)
    where = f"{instruction} failed: " if instruction else ""
    return StepFailed(f"building `{image}`: {where}{detail.get('message') or event['error']}")


def _dockerfile(params: Params, plan_dir: Path, folder: Path) -> Path:
    if not params.dockerfile:
        candidates = [folder / "Dockerfile"]
    else:
        candidates = [plan_dir / params.dockerfile, folder / params.dockerfile]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    looked = " and ".join(f"`{candidate}`" for candidate in dict.fromkeys(candidates))
    raise StepError(f"there is no Dockerfile; looked for {looked}\n\nhint: set `dockerfile`, relative to the plan")


def _refuse_secrets(params: Params, context: Context) -> None:
    for block in ("build_args", "labels"):
        for name, value in getattr(params, block).items():
            if any(secret and secret in value for secret in context.secrets.values()):
                raise StepError(
                    f"`{block}.{name}` holds a secret, which would stay in the image\n\n"
                    "hint: fetch what needs the secret in a step before, and COPY it"
                )
