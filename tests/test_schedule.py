"""The schedule decides alone: every test drives it with outcomes of its own, no Temporal, no process."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.expressions import render
from bridge.order import dependencies
from bridge.plan import Plan, Step
from bridge.report import StepReport
from bridge.retries import kept_reports
from bridge.schedule import MOST_IN_FLIGHT, Instance, Schedule


def make_plan(*steps: dict[str, Any], **fields: Any) -> Plan:
    return Plan(steps=[Step.model_validate({"type": "command", **step}) for step in steps], **fields)


def make_schedule(plan: Plan, reports: dict[str, StepReport] | None = None) -> Schedule:
    return Schedule(plan, {"params": {}, "env": {}}, dependencies, render, reports)


def ended(instance: Instance, outcome: Any = "succeeded", **fields: Any) -> StepReport:
    return StepReport(
        id=instance.id, outcome=outcome, allow_failure=bool(instance.step.allow_failure), **{"exit_code": 0, **fields}
    )


def run(
    plan: Plan, outcomes: dict[str, str] | None = None, outputs: dict[str, dict[str, Any]] | None = None
) -> Schedule:
    """Run the plan to its end, each step ending as told, in the order of their starts."""
    schedule = make_schedule(plan)
    while True:
        for instance in schedule.ready():
            outcome = (outcomes or {}).get(instance.id, "succeeded")
            exit_code = 1 if outcome == "failed" else 0
            report = ended(instance, outcome, exit_code=exit_code, outputs=(outputs or {}).get(instance.id, {}))
            schedule.finish(instance, report)
        if schedule.done:
            return schedule


def outcomes_of(schedule: Schedule) -> dict[str, str]:
    return {report.id: report.outcome for report in schedule.reports()}


def test_a_step_starts_when_its_own_dependencies_are_done_not_when_a_wave_is() -> None:
    schedule = make_schedule(make_plan({"id": "slow"}, {"id": "quick"}, {"id": "after", "depends_on": ["quick"]}))
    slow, quick = schedule.ready()
    schedule.finish(quick, ended(quick))
    assert [instance.id for instance in schedule.ready()] == ["after"]
    assert slow.id in schedule.in_flight


def test_a_failure_skips_what_depends_on_it_runs_its_handlers_and_leaves_the_rest() -> None:
    plan = make_plan(
        {"id": "a"},
        {"id": "skipped", "depends_on": ["a"]},
        {"id": "skipped_too", "depends_on": ["skipped"]},
        {"id": "handler", "when": {"step": "a", "status": "failure"}},
        {"id": "after_handler", "depends_on": ["handler"]},
        {"id": "always", "when": "always", "depends_on": ["skipped_too"]},
        {"id": "success_only", "when": {"step": "a", "status": "success"}},
        {"id": "unrelated"},
        max_parallel=1,
    )
    schedule = run(plan, {"a": "failed"})
    assert outcomes_of(schedule) == {
        "a": "failed",
        "skipped": "skipped",
        "skipped_too": "skipped",
        "handler": "succeeded",
        "after_handler": "succeeded",
        "always": "succeeded",
        "success_only": "skipped",
        "unrelated": "not_run",
    }
    assert schedule.outcome() == "failed"


def test_a_skip_by_when_tells_what_the_condition_saw() -> None:
    plan = make_plan(
        {"id": "a", "allow_failure": True},
        {"id": "b"},
        {"id": "code", "when": {"step": "a", "exit_code": [3, 4]}},
        {
            "id": "out",
            "when": {"all": [{"step": "b", "outputs": {"n": 2, "m": 1}}, {"step": "b", "status": "success"}]},
        },
        {"id": "gone", "when": {"any": [{"step": "code", "exit_code": 0}, {"step": "a", "status": "success"}]}},
    )
    schedule = run(plan, {"a": "failed"}, {"b": {"n": 1}})
    said = {report.id: report.error.removeprefix("its `when` does not hold: ") for report in schedule.reports()}
    assert said["code"] == "`a` failed with exit code 1"
    assert said["out"] == "`b` succeeded, its `n` is `1` without an output `m`, `b` succeeded"
    assert said["gone"] == "`code` skipped, `a` failed"


def test_when_implies_the_dependency_and_ignores_the_outcome_of_the_others() -> None:
    plan = make_plan(
        {"id": "a", "allow_failure": True},
        {"id": "b"},
        {"id": "c", "depends_on": ["a"], "when": {"step": "b", "status": "success"}},
    )
    schedule = make_schedule(plan)
    assert [instance.id for instance in schedule.ready()] == ["a", "b"]
    schedule = run(plan, {"a": "failed"})
    assert outcomes_of(schedule)["c"] == "succeeded"
    assert schedule.outcome() == "succeeded"


@pytest.mark.parametrize(
    ("condition", "runs"),
    [
        ({"step": "a", "status": "failure"}, True),
        ({"step": "a", "status": "timed_out"}, False),
        ({"step": "a", "exit_code": [1, 2]}, True),
        ({"step": "a", "exit_code": 2}, False),
        ({"any": [{"step": "a", "status": "success"}, {"step": "b", "outputs": {"n": 3}}]}, True),
        ({"all": [{"step": "a", "status": "failure"}, {"step": "b", "outputs": {"n": 4}}]}, False),
        ({"step": "b", "outputs": {"missing": None}}, False),
    ],
)
def test_conditions(condition: dict[str, Any], runs: bool) -> None:
    plan = make_plan({"id": "a", "allow_failure": True}, {"id": "b"}, {"id": "c", "when": condition})
    schedule = run(plan, {"a": "failed"}, {"b": {"n": 3}})
    assert outcomes_of(schedule)["c"] == ("succeeded" if runs else "skipped")


def test_matrix_from_an_output_gives_lists_in_order_and_respects_its_limit() -> None:
    plan = make_plan(
        {"id": "list"},
        {"id": "each", "matrix": {"n": "${{ steps.list.outputs.all }}"}, "max_parallel": 2},
        {"id": "merge", "depends_on": ["each"]},
    )
    schedule = make_schedule(plan)
    (first,) = schedule.ready()
    schedule.finish(first, ended(first, outputs={"all": [30, 10, 20]}))
    running = schedule.ready()
    assert [instance.id for instance in running] == ["each.0", "each.1"]
    assert [instance.matrix for instance in running] == [{"n": 30}, {"n": 10}]
    schedule.finish(running[1], ended(running[1], outputs={"x": "second"}))
    (third,) = schedule.ready()
    for instance, value in ((running[0], "first"), (third, "third")):
        schedule.finish(instance, ended(instance, outputs={"x": value}))
    assert schedule.scope["steps"]["each"]["outputs"] == {"x": ["first", "second", "third"]}
    assert [instance.id for instance in schedule.ready()] == ["merge"]


def test_empty_matrix_succeeds_and_a_matrix_of_no_list_fails() -> None:
    assert outcomes_of(run(make_plan({"id": "m", "matrix": {"n": []}}, {"id": "x", "depends_on": ["m"]}))) == {
        "m": "succeeded",
        "x": "succeeded",
    }
    schedule = run(
        make_plan({"id": "a"}, {"id": "m", "matrix": {"n": "${{ steps.a.outputs.n }}"}}), outputs={"a": {"n": 3}}
    )
    assert schedule.reports()[1].error == "matrix `n` of step `m` is int, wanted a list"
    assert schedule.outcome() == "failed"


def test_locks_are_never_held_twice_and_free_what_waits() -> None:
    plan = make_plan({"id": "a", "locks": ["x"]}, {"id": "b", "locks": ["x", "y"]}, {"id": "c", "locks": ["y"]})
    schedule = make_schedule(plan)
    a, c = schedule.ready()
    assert (a.id, c.id) == ("a", "c")
    schedule.finish(a, ended(a))
    assert schedule.ready() == []
    schedule.finish(c, ended(c))
    assert [instance.id for instance in schedule.ready()] == ["b"]


def test_cancel_runs_clean_up_only() -> None:
    plan = make_plan(
        {"id": "a"}, {"id": "b", "depends_on": ["a"]}, {"id": "clean", "when": "always", "depends_on": ["b"]}
    )
    schedule = make_schedule(plan)
    (a,) = schedule.ready()
    schedule.stop("cancelled")
    schedule.finish(a, ended(a, "cancelled"))
    (clean,) = schedule.ready()
    schedule.finish(clean, ended(clean))
    assert schedule.done
    assert outcomes_of(schedule) == {"a": "cancelled", "b": "skipped", "clean": "succeeded"}
    assert schedule.outcome() == "cancelled"


def test_carried_reports_are_not_run_again() -> None:
    plan = make_plan({"id": "a"}, {"id": "m", "matrix": {"n": [1, 2]}}, {"id": "z", "depends_on": ["a", "m"]})
    reports = {"a": StepReport(id="a", outcome="succeeded"), "m.0": StepReport(id="m.0", outcome="succeeded")}
    schedule = make_schedule(plan, reports)
    assert [instance.id for instance in schedule.ready()] == ["m.1"]
    assert schedule.decided() == []


@pytest.mark.parametrize(
    ("outcome", "fields", "expected"),
    [
        ("failed", {}, "failed"),
        ("timed_out", {}, "failed"),
        ("cancelled", {}, "failed"),
        ("failed", {"allow_failure": True}, "succeeded"),
        ("skipped", {}, "succeeded"),
    ],
)
def test_a_carried_outcome_stops_the_run_as_it_would_have_before(
    outcome: Any, fields: dict[str, Any], expected: str
) -> None:
    plan = make_plan(
        {"id": "a"},
        {"id": "m", "matrix": {"n": [1, 2]}, **fields},
        {"id": "b", "depends_on": ["a"]},
        {"id": "always", "when": "always", "depends_on": ["m"]},
    )
    reports = {
        "a": StepReport(id="a", outcome="succeeded"),
        "m.0": StepReport(id="m.0", outcome=outcome),
        "m.1": StepReport(id="m.1", outcome="succeeded"),
    }
    schedule = make_schedule(plan, reports)
    while not schedule.done:
        for instance in schedule.ready():
            schedule.finish(instance, ended(instance))
    assert schedule.outcome() == expected
    assert outcomes_of(schedule)["b"] == ("not_run" if expected == "failed" else "succeeded")
    assert outcomes_of(schedule)["always"] == "succeeded"


def test_a_retry_keeps_what_nothing_that_runs_again_could_have_changed() -> None:
    plan = make_plan(
        {"id": "shard", "matrix": {"n": [0, 1, 2]}, "allow_failure": True},
        {"id": "merge", "when": "always", "depends_on": ["shard"]},
        {"id": "publish", "env": {"N": "${{ steps.merge.outputs.n }}"}},
        {"id": "other"},
        {"id": "optional", "when": {"step": "other", "status": "failure"}},
        {"id": "clean", "when": "always", "depends_on": ["optional"]},
        {"id": "handler", "when": {"step": "shard", "status": "failure"}},
    )
    schedule = run(plan, {"shard.1": "failed"})
    assert outcomes_of(schedule)["optional"] == "skipped"
    kept = kept_reports(plan, schedule.reports())
    assert [report.id for report in kept] == ["shard.0", "shard.2", "other", "clean"]
    again = make_schedule(plan, {report.id: report for report in kept})
    assert [instance.id for instance in again.ready()] == ["shard.1"]


def test_a_retry_runs_what_was_never_decided_and_what_follows_from_it() -> None:
    plan = make_plan({"id": "a"}, {"id": "b"}, {"id": "c", "depends_on": ["a", "b"], "when": "always"})
    kept = kept_reports(plan, [StepReport(id=step_id, outcome="succeeded") for step_id in ("a", "c")])
    assert [report.id for report in kept] == ["a"]


def test_no_more_than_the_limit_is_in_flight() -> None:
    schedule = make_schedule(make_plan(*({"id": f"s{number}"} for number in range(MOST_IN_FLIGHT + 1))))
    started = schedule.ready()
    assert len(started) == MOST_IN_FLIGHT
    assert schedule.ready() == []
    schedule.finish(started[0], ended(started[0]))
    assert [instance.id for instance in schedule.ready()] == [f"s{MOST_IN_FLIGHT}"]


def test_a_chain_of_ten_thousand_skips_needs_no_deep_stack() -> None:
    steps = [{"id": f"s{number}", "depends_on": [f"s{number - 1}"] if number else []} for number in range(10_000)]
    schedule = run(make_plan(*steps), {"s0": "failed"})
    assert outcomes_of(schedule)["s9999"] == "skipped"


@st.composite
def plans(draw: st.DrawFn) -> tuple[Plan, dict[str, str]]:
    size = draw(st.integers(1, 8))
    steps, outcomes = [], {}
    for number in range(size):
        earlier = [f"s{other}" for other in range(number)]
        step: dict[str, Any] = {"id": f"s{number}", "allow_failure": draw(st.booleans())}
        if earlier:
            step["depends_on"] = draw(st.lists(st.sampled_from(earlier), unique=True, max_size=3))
            status = st.sampled_from(["success", "failure", "skipped"])
            leaf = st.fixed_dictionaries({"step": st.sampled_from(earlier), "status": status})
            step["when"] = draw(
                st.none()
                | st.just("always")
                | leaf
                | st.fixed_dictionaries({"any": st.lists(leaf, min_size=1, max_size=2)})
            )
        steps.append(step)
        outcomes[step["id"]] = draw(st.sampled_from(["succeeded", "failed", "timed_out"]))
    fields = {"max_parallel": draw(st.none() | st.integers(1, 3))}
    return make_plan(*draw(st.permutations(steps)), **fields), outcomes


@settings(max_examples=300, deadline=None)
@given(plans(), st.randoms(use_true_random=False))
def test_every_step_of_every_plan_gets_exactly_one_outcome_that_its_rules_allow(
    case: tuple[Plan, dict[str, str]], random: Any
) -> None:
    plan, outcomes = case
    schedule = make_schedule(plan)
    running: list[Instance] = []
    started: list[str] = []
    stopped_before: dict[str, bool] = {}
    while True:
        for instance in schedule.ready():
            running.append(instance)
            started.append(instance.id)
            stopped_before[instance.id] = bool(schedule.stopped)
            decided = {report.id: report.outcome for report in schedule.reports()}
            assert dependencies(instance.step) <= decided.keys()
            if instance.step.when is None:
                assert all(decided[other] == "succeeded" for other in instance.step.depends_on)
        assert len(running) <= (plan.max_parallel or MOST_IN_FLIGHT)
        if schedule.done:
            break
        instance = running.pop(random.randrange(len(running)))
        outcome = outcomes[instance.id]
        schedule.finish(instance, ended(instance, outcome, exit_code=int(outcome != "succeeded")))
    reports = schedule.reports()
    assert sorted(report.id for report in reports) == sorted(step.id for step in plan.steps)
    assert len(started) == len(set(started))
    hard = [report for report in reports if report.outcome in ("failed", "timed_out") and not report.allow_failure]
    assert schedule.outcome() == ("failed" if hard else "succeeded")
    for report in reports:
        assert (report.id in started) == (report.outcome in ("succeeded", "failed", "timed_out"))
        assert report.outcome != "not_run" or hard
        assert not report.outcome.startswith("s") or report.id in started or report.error
