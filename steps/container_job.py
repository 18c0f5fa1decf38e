"""Run a command in the standard container: its mounts, its entrypoints, the GPUs asked for."""

import contextlib
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

from steps import Context, Frozen, PlanPath, Shell, StepCancelled, StepError, StepFailed
from steps import Outputs as StepOutputs

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.containers import Container

    from container.launch import Job

_OF_THE_NODE = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH")
"""Declared for programs beside the worker; a container has its own. The block's `env` may set them."""

_STATE_VARIABLE = "ORCHESTRATE_STATE_DIR"
"""The state directory of the local services, where they run the step; `orchestrate down` ends its containers."""


def _is_mount(value: str) -> str:
    if "${{" in value or re.fullmatch(r"[^:]+:/[^:]*(:ro|:rw)?", value):
        return value
    raise ValueError(f"got `{value}`, wanted `host:/container`, or that with `:ro`")


drives_engine = True


class Params(Frozen):
    command: Shell
    """Command line, run by `bash -c` in the container."""
    project_id: str = ""
    """Names the project whose caches are mounted; `SYGALDRY_PROJECT_ID` or the workspace's folder name by default."""
    entrypoint: str = "run-job.sh"
    """Which entrypoint runs the command, with or without `.sh`."""
    env: dict[str, str] = {}
    """Environment in the container, in addition to what the plan and the step declare."""
    gpu: bool = False
    """Give the container the step's GPUs, or all where none are assigned."""
    launcher_path: PlanPath = ""
    """A launcher script to use instead of our own launch, when it exists: `LAUNCHER --entrypoint NAME -- COMMAND`."""
    image: str = ""
    """Image to run; `SYGALDRY_IMAGE` or `sygaldry/zephyr:base` by default."""
    mounts: list[Annotated[str, AfterValidator(_is_mount)]] = []
    """Further mounts, `host:container` or `host:container:ro`; relative host paths are the plan's."""
    memory: str = ""
    """Memory limit, such as `8GiB`."""
    cpus: float = 0
    """Limit of CPU cores; 0 is none."""
    network: str = "host"
    """`host`, `none`, `bridge` or the name of a network."""
    workspace: PlanPath = ""
    """Host folder mounted as `/workspace`; the step's working directory by default."""
    environment: str = ""
    """Spack environment to activate: its name, or its folder relative to the plan's; built before, by `orchestrate
    spack build`. Its lock is part of the step's cache key."""


class Outputs(Frozen):
    container: str = ""
    """Name the container had; the three are empty when a launcher script ran it."""
    image: str = ""
    """Name of the image."""
    image_id: str = ""
    """`sha256:...` of the image that ran."""
    exit_code: int
    """Always 0: every other code fails the step."""


def run(params: Params, context: Context) -> StepOutputs:
    if params.launcher_path and _is_foreign(context.plan_dir / params.launcher_path):
        return _run_launcher(params, context)

    from container.launch import LaunchError
    from steps._docker import engine

    job = _job(params, context)
    with engine(context, ends_on_cancel=False) as client:
        try:
            return _run_here(client, job, context)
        except LaunchError as error:
            raise StepError(str(error)) from error


def identities(params: Params, plan_dir: Path, env: Mapping[str, str]) -> dict[str, str]:
    """See `steps`: the image as it is on this machine now, and the environment as it is locked now."""
    from container.image_identity import image_identity
    from container.launch import DEFAULT_IMAGE
    from steps._spack import ACTIVE_VARIABLE, environment_identity

    image = params.image or env.get("SYGALDRY_IMAGE") or DEFAULT_IMAGE
    found = {"image": image_identity(image, env)}
    if named := params.environment or params.env.get(ACTIVE_VARIABLE) or env.get(ACTIVE_VARIABLE):
        found["environment"] = environment_identity(named, plan_dir)
    return found


def _run_here(client: "DockerClient", job: "Job", context: Context) -> StepOutputs:
    from container.launch import attach_or_start, remove

    try:
        container = attach_or_start(client, job, context.log)
        exit_code = _wait(container, context)
        state = client.api.inspect_container(job.name)
    except BaseException:
        # A cancel may interrupt the cleaning up as well, once.
        with contextlib.suppress(StepCancelled):
            remove(client, job.name)
        remove(client, job.name)
        raise
    remove(client, job.name)
    if exit_code != 0:
        cause = ": out of memory" if state["State"].get("OOMKilled") else ""
        hint = "\n\nhint: 127 is a program that was not found; the entrypoints need bash" if exit_code == 127 else ""
        raise StepFailed(f"the command in `{job.image}` ended with exit code {exit_code}{cause}{hint}", exit_code)
    return {"container": job.name, "image": job.image, "image_id": state["Image"], "exit_code": exit_code}


def _wait(container: "Container", context: Context) -> int:
    """Copy the output until the container ends; its exit code. A cancel stops it, and its last words are copied too."""
    import requests
    from docker.errors import APIError

    from container.output import STREAMS, Follower, Position, copy

    copied = threading.Event()

    def stop() -> None:
        """SIGTERM, then SIGKILL; in less than the grace period, so that the last words are still copied."""
        with contextlib.suppress(APIError, requests.RequestException):
            container.kill("SIGTERM")
            container.wait(timeout=max(0.1, 0.8 * context.grace_s))
        with contextlib.suppress(APIError):
            container.kill()
        copied.wait(2)

    context.on_cancel(stop)
    context.check_cancelled()
    position = Position(context.attempt_dir / f"container-{container.short_id}.position")
    try:
        while True:
            follower = Follower(container, position, context.log)
            while not follower.join(1):
                pass
            # The engine ends the streams a moment before the container counts as ended, or because it restarts.
            with contextlib.suppress(requests.Timeout, requests.ConnectionError):
                exit_code = int(container.wait(timeout=10)["StatusCode"])
                break
            context.check_cancelled()
        for stream in STREAMS:
            copy(container, stream, position, context.log, follow=False)
    finally:
        copied.set()
        position.close()
    context.check_cancelled()
    return exit_code


def _job(params: Params, context: Context) -> "Job":
    from container.launch import DEFAULT_IMAGE, Job
    from container.mounts import STORE, container_root, parse_mounts, project_id
    from container.step_containers import STATE_LABEL, state_digest
    from steps._environment import OUTPUTS_VARIABLE
    from steps._spack import ACTIVE_VARIABLE, built_environment

    workspace = context.plan_dir / params.workspace if params.workspace else context.working_dir
    if not workspace.is_dir():
        raise StepError(f"workspace `{workspace}` is not a folder")
    env, secrets = _environment(params, context)
    try:
        project = project_id(params.project_id or context.env.get("SYGALDRY_PROJECT_ID", ""), workspace)
        mounts = parse_mounts(params.mounts, context.plan_dir)
    except ValueError as error:
        raise StepError(str(error)) from error
    root = container_root(context.env, project)
    if params.environment:
        stores = [Path(mount.host) for mount in mounts if mount.container == STORE]
        store = stores[-1] if stores else root / "spack_store"
        env[ACTIVE_VARIABLE] = built_environment(params.environment, context.plan_dir, store).name
    outputs, state_dir = context.env.get(OUTPUTS_VARIABLE), context.env.get(_STATE_VARIABLE)
    return Job(
        key=context.key,
        command=["bash", "-c", params.command],
        project_id=project,
        root=root,
        workspace=workspace,
        image=params.image or context.env.get("SYGALDRY_IMAGE") or DEFAULT_IMAGE,
        entrypoint=params.entrypoint,
        env=env,
        secrets=secrets,
        mounts=mounts,
        gpu=params.gpu,
        gpus=context.gpus,
        memory=params.memory,
        cpus=params.cpus,
        network=params.network,
        outputs=Path(outputs) if outputs else None,
        labels={STATE_LABEL: state_digest(state_dir)} if state_dir else {},
    )


def _environment(params: Params, context: Context) -> tuple[dict[str, str], dict[str, str]]:
    """Environment of the job: what the engine may keep in its records, and what it may not."""
    from container.launch import PORTABLE_NAMES, SECRET_NAMES, is_secret
    from steps._process import STEP_KEY_VARIABLE

    names = (*PORTABLE_NAMES, *SECRET_NAMES, "STEP_ID", "STEP_ATTEMPT", STEP_KEY_VARIABLE)
    node = {name: context.env[name] for name in names if name in context.env}
    declared = {name: value for name, value in context.declared_env.items() if name not in _OF_THE_NODE}
    whole = {**node, **declared, **params.env}
    values = [value for value in context.secrets.values() if value]
    secret = {
        name: value
        for name, value in whole.items()
        if is_secret(name, value) or any(hidden in value for hidden in values)
    }
    return {name: value for name, value in whole.items() if name not in secret}, secret


def _is_foreign(launcher: Path) -> bool:
    """Whether there is such a script and it is not our own, which could do no more than we do."""
    import container

    own = Path(container.__file__ or "").with_name("launch_container.sh")
    return launcher.is_file() and not (own.is_file() and launcher.samefile(own))


def _run_launcher(params: Params, context: Context) -> StepOutputs:
    """The old contract: the launcher does everything and gets the command as one argument."""
    env = dict(params.env)
    if params.project_id:
        env["SYGALDRY_PROJECT_ID"] = params.project_id
    if not params.gpu:
        env["SYGALDRY_GPU"] = "false"
    if params.environment:
        env["SYGALDRY_SPACK_ENVIRONMENT"] = Path(params.environment).name
    launcher = str(context.plan_dir / params.launcher_path)
    entrypoint = params.entrypoint.removesuffix(".sh")
    exit_code = context.run_process([launcher, "--entrypoint", entrypoint, "--", params.command], env=env)
    if exit_code != 0:
        raise StepFailed(f"`{launcher}` ended with exit code {exit_code}", exit_code)
    return {"exit_code": exit_code}
