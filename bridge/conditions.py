"""Whether a `when` can ever be true: tried on every outcome that the steps it looks at can have."""

from collections.abc import Callable, Iterable, Mapping
from itertools import product

from bridge.expressions import is_template
from bridge.plan import Condition, Status, Step

MAX_CASES = 4096
"""More combinations than this are not tried; such a condition counts as possible."""

STATUSES: dict[Status, frozenset[str]] = {
    "success": frozenset({"succeeded"}),
    "failure": frozenset({"failed", "timed_out"}),
    "succeeded": frozenset({"succeeded"}),
    "failed": frozenset({"failed"}),
    "skipped": frozenset({"skipped"}),
    "cancelled": frozenset({"cancelled"}),
    "timed_out": frozenset({"timed_out"}),
}
"""Status in a plan -> the outcomes it stands for."""

_ENDED_ITSELF = frozenset({"succeeded", "failed", "timed_out"})
_EXIT_CODES = frozenset(range(-64, 256))
"""What a process can end with; negative for a signal."""

Test = tuple[str, Condition]
Case = tuple[Test, ...]


def never_true(condition: Condition, steps: Mapping[str, Step], dependencies: Callable[[Step], set[str]]) -> str | None:
    """Why the condition can never be true, or None when it can be."""
    cases = _cases(condition)
    if cases is None:
        return None
    reason = None
    for case in cases:
        reason = _contradiction(case, steps, dependencies)
        if reason is None:
            return None
    return reason or "it is empty"


def _cases(condition: Condition) -> list[Case] | None:
    """The condition as alternatives, each a set of tests that must hold together; None when there are too many."""
    if condition.step is not None:
        return [((condition.step, condition),)]
    if condition.always:
        return [()]
    parts = [_cases(part) for part in (condition.any or condition.all or [])]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    if condition.any is not None:
        alternatives = [case for part in known for case in part]
        return alternatives if len(alternatives) <= MAX_CASES else None
    size = 1
    for part in known:
        size *= len(part)
        if size > MAX_CASES:
            return None
    return [sum(chosen, ()) for chosen in product(*known)]


def _contradiction(case: Case, steps: Mapping[str, Step], dependencies: Callable[[Step], set[str]]) -> str | None:
    outcomes: dict[str, frozenset[str]] = {}
    for name in dict.fromkeys(name for name, _ in case):
        tests = [test for other, test in case if other == name]
        step = steps.get(name)
        if step is None:
            continue
        possible = _possible(step, tests, dependencies)
        if isinstance(possible, str):
            return possible
        outcomes[name] = possible
    return _conflict_between(outcomes, steps, dependencies)


def _possible(step: Step, tests: list[Condition], dependencies: Callable[[Step], set[str]]) -> frozenset[str] | str:
    """Outcomes that pass every test of one step, or why there are none."""
    outcomes = frozenset({"succeeded", "failed", "timed_out", "cancelled"})
    can_be_skipped = step.when is not None or bool(dependencies(step) - {step.id})
    if can_be_skipped:
        outcomes |= {"skipped"}
    for test in tests:
        if test.status is not None:
            allowed = outcomes & STATUSES[test.status]
            if not allowed:
                if test.status == "skipped" and not can_be_skipped:
                    return f"step `{step.id}` is never skipped: it has no `depends_on` and no `when`"
                return f"step `{step.id}` cannot have all of these outcomes at once"
            outcomes = allowed
    codes = _allowed_codes(tests)
    if codes is not None:
        if not codes & _EXIT_CODES:
            return f"no process ends with the exit code that is wanted of step `{step.id}`"
        outcomes = frozenset(outcome for outcome in outcomes if _can_end_with(outcome, codes))
        if not outcomes:
            return f"step `{step.id}` cannot have that exit code and that outcome: success is exit code 0"
    if any(test.outputs for test in tests):
        outcomes &= _ENDED_ITSELF
        if not outcomes:
            return f"step `{step.id}` has no outputs with that outcome"
        name = _contradicting_output(tests)
        if name is not None:
            return f"output `{name}` of step `{step.id}` cannot have two values"
    return outcomes


def _allowed_codes(tests: Iterable[Condition]) -> frozenset[int] | None:
    allowed: frozenset[int] | None = None
    for test in tests:
        if test.exit_code is not None:
            codes = frozenset(test.exit_code if isinstance(test.exit_code, list) else [test.exit_code])
            allowed = codes if allowed is None else allowed & codes
    return allowed


def _can_end_with(outcome: str, codes: frozenset[int]) -> bool:
    if outcome == "skipped":
        return False
    return 0 in codes if outcome == "succeeded" else bool((codes & _EXIT_CODES) - {0})


def _contradicting_output(tests: Iterable[Condition]) -> str | None:
    values: dict[str, object] = {}
    for test in tests:
        for name, value in (test.outputs or {}).items():
            if is_template(value):
                continue
            if name in values and values[name] != value:
                return name
            values[name] = value
    return None


def _conflict_between(
    outcomes: Mapping[str, frozenset[str]], steps: Mapping[str, Step], dependencies: Callable[[Step], set[str]]
) -> str | None:
    """A step that ran although what it waits for did not succeed."""
    if all("succeeded" in allowed for allowed in outcomes.values()) or len(outcomes) < 2:
        return None
    for name, wanted in outcomes.items():
        if not wanted <= _ENDED_ITSELF:
            continue
        waiting, seen = [name], {name}
        while waiting:
            step = steps[waiting.pop()]
            if step.when is not None:
                continue
            for dependency in sorted(dependencies(step)):
                if dependency in seen or dependency not in steps:
                    continue
                seen.add(dependency)
                waiting.append(dependency)
                if dependency in outcomes and "succeeded" not in outcomes[dependency]:
                    return f"step `{name}` only runs when step `{dependency}` has succeeded"
    return None
