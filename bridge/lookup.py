"""Which steps of a plan the cache already knows, and why one is not among them.

Walks the plan with the run's own `Schedule`: a step whose dependencies came from the cache is asked for in its turn, so
a chain of unchanged steps is found in one go.
"""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from bridge.cache import Change, StepCache
from bridge.cache_key import digest, key_fields
from bridge.calls import Begin, Begun, RunInput, StepCall
from bridge.expressions import ExpressionError, render
from bridge.order import dependencies
from bridge.plan import Cache
from bridge.report import step_report
from bridge.requests import run_scope, step_call
from bridge.schedule import Instance, Schedule
from container.image_identity import image_identity
from steps import StepError, StepResult
from steps._files import attempt_dir, read_json, write_once

FIELDS = "cache.json"
"""In the attempt's folder: what the cache key was made of before the step ran."""
log = logging.getLogger(__name__)


def cache_fields(call: StepCall, cache: StepCache) -> dict[str, str]:
    """What the cache key of a call is made of. Raises `StepError` when that cannot be found out."""
    # The name of an actor is no input of what runs there.
    asked = call.resources.model_dump(mode="json", exclude_defaults=True, exclude={"actor"}) if call.resources else {}
    try:
        return key_fields(
            call.request,
            call.cache or Cache(),
            image=call.image,
            image_digest=image_identity(call.image, os.environ) if call.image else "",
            resources=asked,
            hasher=cache.hasher,
        )
    except (OSError, ValueError) as error:
        # A glob that is none, for example.
        raise StepError(f"step `{call.request.step_id}` cannot be looked up in the cache: {error}") from error


def write_fields(folder: Path, fields: dict[str, str]) -> None:
    """Make the attempt's folder and write there, before the step runs, what its result will be made from."""
    folder.mkdir(parents=True, exist_ok=True)
    write_once(folder / FIELDS, json.dumps(fields), mode=0o600)


def keep(call: StepCall, result: StepResult, cache: StepCache) -> None:
    """Store the result of a step that succeeded, unless nobody wrote down what it was made from.

    The files may be others by now: the step or somebody else has changed them, and this worker found it running.
    """
    artifacts = call.cache.artifacts if call.cache is not None else []
    request = call.request
    try:
        fields = read_json(attempt_dir(request) / FIELDS)
    except (OSError, ValueError) as error:
        log.warning("step `%s` is not cached: %s", request.step_id, error)
        return
    if fields is None:
        return
    cache.store(call.plan, request.step_id, fields, digest(fields), result, artifacts, plan_dir=request.plan_dir)


def find_cached(begin: Begin, cache: StepCache) -> Begun:
    """Every step that need not run, as far as the cache alone can tell."""
    cached, looked_up = [], []
    for instance, _, found in _walk(begin.run, begin.workflow_id, cache):
        looked_up.append(instance.id)
        if found is not None:
            cached.append(step_report(instance.id, instance.name, instance.step.type, found, []))
    return Begun(cached=cached, looked_up=looked_up)


def explain(run: RunInput, step_id: str, cache: StepCache) -> list[Change]:
    """Why a step, or the instances of a matrix step, would run again; empty when it would not."""
    changes, seen = [], False
    for instance, call, found in _walk(run, "explain", cache):
        if step_id in (instance.id, instance.step.id):
            seen = True
            if found is None:
                fields = cache_fields(call, cache)
                known = cache.explain(run.plan.name, instance.id, fields, plan_dir=run.plan_dir)
                changes += known or [Change("(never ran)", "", "")]
    if seen:
        return changes
    step = next(step for step in run.plan.steps if step.id == step_id)
    if not step.cache:
        return [Change("cache", "", "the step has no `cache`")]
    return [Change("depends_on", "", f"runs again: {name}") for name in sorted(dependencies(step))]


def _walk(run: RunInput, workflow_id: str, cache: StepCache) -> Iterator[tuple[Instance, StepCall, StepResult | None]]:
    """Every cacheable instance that can be asked for, and what was found; a miss blocks what depends on it."""
    reports = {report.id: report for report in run.reports}
    schedule = Schedule(run.plan, run_scope(run, workflow_id), dependencies, render, reports)
    while ready := schedule.ready():
        for instance in ready:
            if not instance.step.cache:
                continue
            try:
                call = step_call(run, instance, schedule.scope, workflow_id=workflow_id, run_id="", attempt=1)
            except (ExpressionError, StepError, ValueError):
                continue
            try:
                found = cache.find(digest(cache_fields(call, cache)), plan_dir=run.plan_dir)
            except StepError:
                # The step itself tells it, and the others are looked up.
                found = None
            yield instance, call, found
            if found is not None:
                schedule.finish(instance, step_report(instance.id, instance.name, instance.step.type, found, []))
