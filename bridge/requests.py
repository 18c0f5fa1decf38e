"""From a plan step to a `StepCall`: every template rendered, every path absolute. Pure, used by workflow and cache."""

from pathlib import PurePosixPath
from typing import Any

from pydantic import ByteSize, TypeAdapter, ValidationError

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
        ),
        plan=run.plan.name,
        resources=_resources(step.resources, own),
        image=str(render(step.image or "", own)),
        cache=_cache(step.cache, own),
    )


def _resources(resources: Resources | None, scope: Scope) -> Resources | None:
    """Rendered; None when it asks for nothing at all."""
    if resources is None:
        return None
    rendered = Resources.model_validate(render(resources.model_dump(exclude_defaults=True), scope))
    for name, amount in {"cpus": rendered.cpus, "gpus": rendered.gpus, **rendered.custom}.items():
        if amount is not None and not _is_amount(amount):
            raise StepError(f"`{name}` of `resources` is {brief(amount)}, wanted a number of at least 0")
    try:
        _BYTES.validate_python(rendered.memory or 0)
    except ValidationError:
        wanted = "wanted bytes or a text like `8GiB`"
        raise StepError(f"`memory` of `resources` is {brief(rendered.memory)}, {wanted}") from None
    return rendered if rendered != Resources() else None


def _is_amount(amount: object) -> bool:
    try:
        return 0 <= float(str(amount)) < float("inf")
    except ValueError:
        return False


def _cache(cache: bool | Cache | None, scope: Scope) -> Cache | None:
    if cache is None or cache is False:
        return None
    if cache is True:
        return Cache()
    return Cache.model_validate(render(cache.model_dump(), scope))


def _texts(values: dict[str, Any]) -> dict[str, str]:
    return {name: to_text(value) for name, value in values.items()}
