"""From a plan step to a `StepCall`: every template rendered, every path absolute. Pure, used by workflow and cache."""

from pathlib import PurePosixPath
from typing import Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from bridge.amounts import gang_of_an_actor, is_name, wanted_instead
from bridge.calls import RunInput, StepCall
from bridge.expressions import render, render_params, to_text
from bridge.plan import DEFAULT_TIMEOUT_S, Cache, Resources
from bridge.problems import brief
from bridge.schedule import Instance, Scope
from steps import StepError, StepRequest
from steps._registry import find

_BYTES = TypeAdapter(ByteSize)


def run_scope(run: RunInput, workflow_id: str) -> Scope:
    """What every template of the run may use, but for the outputs of its steps."""
    scope = {"params": run.params, "run": {"id": workflow_id}}
    return {**scope, "env": render(run.plan.env, {**scope, "env": {}})}


def step_call(
    run: RunInput, instance: Instance, scope: Scope, *, workflow_id: str, run_id: str, attempt: int
) -> StepCall:
    """The call of one attempt. Raises `ExpressionError` or `StepError` when a template or a name does not resolve."""
    step = instance.step
    own = {**scope, "matrix": dict(instance.matrix), "run": {**scope["run"], "attempt": attempt}}
    env = {**scope["env"], **_texts(render(step.env, own))}
    own["env"] = env
    working_dir = render(step.working_dir or "", own)
    resources, image = _resources(step.resources, own), str(render(step.image or "", own))
    artifacts = [to_text(artifact) for artifact in render(step.artifacts, own)]
    cache = _cache(step.cache, artifacts, own)
    # Where the cache looks anyway, and the files are, nothing needs to be told.
    away = cache if cache is not None and (resources is not None or image) else Cache()
    return StepCall(
        request=StepRequest(
            workflow_id=workflow_id,
            run_id=run_id,
            step_id=instance.id,
            step_name=instance.name,
            attempt=attempt,
            type=step.type,
            params=render_params(find(step.type).params, step.params, own),
            env=_texts(env),
            secrets=step.secret_variables,
            plan_dir=run.plan_dir,
            working_dir=str(PurePosixPath(run.plan_dir) / working_dir),
            log_dir=run.log_dir,
            timeout_s=step.timeout_seconds or DEFAULT_TIMEOUT_S,
            expected_outputs=tuple(step.outputs),
            artifacts=tuple(artifacts),
            cached_artifacts=tuple(artifact for artifact in away.artifacts if artifact not in artifacts),
            inputs=tuple(away.inputs),
        ),
        plan=run.plan.name,
        resources=resources,
        image=image,
        cache=cache,
    )


def _resources(resources: Resources | None, scope: Scope) -> Resources | None:
    """Rendered; None when it asks for nothing at all."""
    if resources is None:
        return None
    values = render(resources.model_dump(exclude_defaults=True), scope)
    if "actor" in values:
        values["actor"] = to_text(values["actor"])
    rendered = Resources.model_validate(values)
    amounts = {name: getattr(rendered, name) for name in ("nodes", "cpus", "gpus")}
    places = [*((name, name, amount) for name, amount in amounts.items() if amount is not None)]
    places += [("custom", name, amount) for name, amount in rendered.custom.items()]
    for field, name, amount in places:
        if wanted := wanted_instead(field, amount):
            raise StepError(f"`{name}` of `resources` is {brief(amount)}, wanted {wanted}")
    if rendered.actor is not None and not is_name(rendered.actor):
        raise StepError(f"`actor` of `resources` is {brief(rendered.actor)}, wanted a name")
    if fault := gang_of_an_actor(rendered):
        raise StepError(fault)
    try:
        _BYTES.validate_python(rendered.memory or 0)
    except ValidationError:
        wanted = "wanted bytes or a text like `8GiB`"
        raise StepError(f"`memory` of `resources` is {brief(rendered.memory)}, {wanted}") from None
    return rendered if rendered != Resources() else None


def _cache(cache: bool | Cache | None, artifacts: list[str], scope: Scope) -> Cache | None:
    """Rendered, with what the step promises to make among its artifacts."""
    if cache is None or cache is False:
        return None
    rendered = Cache() if cache is True else Cache.model_validate(render(cache.model_dump(), scope))
    return rendered.model_copy(update={"artifacts": list(dict.fromkeys([*rendered.artifacts, *artifacts]))})


def _texts(values: dict[str, Any]) -> dict[str, str]:
    return {name: to_text(value) for name, value in values.items()}
