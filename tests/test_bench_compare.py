"""`orchestrate rl compare`: regressions beyond the spread, and nothing else."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bridge.cli.rl_compare import compare_results
from rl.bench.compare import ResultsError, compare, read_results
from rl.bench.results import CellKey, CellRun, Machine, Mode, Recovery, Results, Transport

MACHINE = Machine(processor="EPYC", num_cores=2, memory_bytes=8_000_000_000, system="Linux", python="3.11.2",
                  versions={"torch": "2.13.0"})  # fmt: skip


def results(times: dict[str, Sequence[float]], **changed: Any) -> Results:
    """Cells of stack ray, `mode -> mean update time of each run`."""
    runs = [_run(mode, time, seed) for mode, of in times.items() for seed, time in enumerate(of)]  # type: ignore[arg-type]
    base = Results(started_at="2026-11-22T03:10:00Z", duration_s=100, commit="", quick=False,
                   config={"model": "tiny"}, machine=MACHINE, runs=tuple(runs))  # fmt: skip
    return base.model_copy(update=changed)


def _run(mode: Mode, update_s: float, seed: int) -> CellRun:
    return CellRun(
        key=CellKey(stack="ray", mode=mode), seed=seed, repeat=0, order=seed, load_before=0.2, num_updates=10,
        update_s=(update_s,) * 10, duration_s=update_s * 10, trajectories=320, trained_tokens=9000,
        generated_tokens=9000, staleness=(0, 0),
    )  # fmt: skip


def write(folder: Path, name: str, found: Results) -> str:
    path = folder / name
    path.write_text(found.model_dump_json())
    return str(path)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(compare_results, arguments)


STEADY = {"sync": (1.00, 1.01, 0.99), "async": (0.70, 0.71, 0.69)}


def test_a_slower_cell_is_a_regression_and_the_other_is_not(tmp_path: Path) -> None:
    first = write(tmp_path, "a.json", results(STEADY))
    second = write(tmp_path, "b.json", results({**STEADY, "async": (0.80, 0.81, 0.79)}))
    done = invoke(first, second)
    assert done.exit_code == 1
    lines = [line for line in done.output.splitlines() if line.startswith("regression")]
    assert {tuple(line.split()[2:5]) for line in lines} >= {
        ("ray", "async", "update_p50_s"),
        ("ray", "async", "samples_per_s"),
    }
    assert not any(" sync " in line for line in lines)
    assert "+14.3%" in done.output
    assert invoke(second, first).exit_code == 0, "the other way it is an improvement"
    assert "improvement" in invoke(second, first).output


def test_a_change_within_the_spread_is_none(tmp_path: Path) -> None:
    noisy = {"async": (0.70, 0.80, 0.90)}
    first = write(tmp_path, "a.json", results(noisy))
    second = write(tmp_path, "b.json", results({"async": (0.85, 0.95, 1.05)}))
    done = invoke(first, second)
    assert done.exit_code == 0, done.output
    assert "0 regressions" in done.output
    assert "within spread" not in done.output.splitlines()[0]
    assert "within spread" in invoke(first, second, "--all").output


def test_the_same_results_have_no_change(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", results(STEADY))
    done = invoke(path, path, "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 0
    assert found["regressions"] == 0
    assert {change["verdict"] for change in found["changes"]} == {"within spread"}
    assert found["warnings"] == []


def test_json_names_cell_metric_and_both_spreads(tmp_path: Path) -> None:
    first = write(tmp_path, "a.json", results(STEADY))
    second = write(tmp_path, "b.json", results({**STEADY, "async": (1.4, 1.41, 1.39)}))
    done = invoke(first, second, "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    change = next(one for one in found["changes"] if (one["subject"], one["metric"]) == ("ray async", "update_p50_s"))
    assert change["verdict"] == "regression"
    assert change["before"] == {"median": 0.7, "low": 0.69, "high": 0.71, "n": 3}
    assert abs(change["change"] - 1.0) < 1e-9
    assert found["regressions"] == sum(one["verdict"] == "regression" for one in found["changes"])


def test_one_run_each_needs_a_large_change() -> None:
    before = results({"async": (1.0,)})
    assert not compare(before, results({"async": (1.3,)})).of("regression")
    found = compare(before, results({"async": (2.0,)}))
    assert {one.metric for one in found.of("regression")} >= {"update_p50_s", "samples_per_s"}
    assert "single run" in " ".join(found.warnings)


def test_numbers_without_a_better_direction_only_change() -> None:
    before, after = results(STEADY), results(STEADY)
    stale = tuple(run.model_copy(update={"staleness": (3, 3)}) for run in after.runs)
    found = compare(before, after.model_copy(update={"runs": stale}))
    assert not found.of("regression")
    assert {one.metric for one in found.of("changed")} == {"staleness_mean", "staleness_p95", "staleness_max"}
    assert all(one.change is None for one in found.of("changed")), "there is no share of 0"


def test_a_cell_that_fails_now_is_a_failure_of_the_comparison(tmp_path: Path) -> None:
    before = results(STEADY)
    failed = tuple(
        run.model_copy(update={"error": "lost"}) if run.key.mode == "async" else run for run in before.runs
    )  # fmt: skip
    first = write(tmp_path, "a.json", before)
    second = write(tmp_path, "b.json", before.model_copy(update={"runs": failed}))
    done = invoke(first, second)
    assert done.exit_code == 1
    assert "failed in the second: ray async" in done.output
    other = write(tmp_path, "c.json", results({"sync": STEADY["sync"], "one-step": (0.7, 0.7, 0.7)}))
    done = invoke(first, other)
    assert done.exit_code == 0
    assert "only in the first: ray async" in done.output
    assert "only in the second: ray one-step" in done.output


def test_transports_and_recoveries_are_compared_too() -> None:
    def of(seconds: float, lost: int) -> Results:
        transport = Transport(name="file", num_bytes=10**8, seconds=(seconds, seconds * 1.02))
        kill = Recovery(stack="ray", killed="generator", seed=0, next_update_s=4, back_s=3, samples_lost=lost,
                        samples_doubled=0, repeated_updates=0)  # fmt: skip
        return results({}, transports=(transport,), recoveries=(kill,))

    found = compare(of(0.1, 0), of(0.2, 1)).of("regression")
    assert {(one.subject, one.metric) for one in found} == {
        ("weights by file, 100 MB", "seconds"),
        ("generator of ray killed", "samples_lost"),
    }


def test_other_settings_machines_and_packages_are_warned_of(tmp_path: Path) -> None:
    machine = MACHINE.model_copy(update={"num_cores": 8, "versions": {"torch": "2.14.0"}})
    first = write(tmp_path, "a.json", results(STEADY))
    second = write(tmp_path, "b.json", results(STEADY, machine=machine, config={"model": "smollm2"}, quick=True))
    done = invoke(first, second)
    assert done.exit_code == 0
    for words in ("`model` was `tiny` and is `smollm2`", "`num_cores` was `2` and is `8`",
                  "`torch` was `2.13.0` and is `2.14.0`", "quick run"):  # fmt: skip
        assert words in done.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file or directory"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "no results of a benchmark"),
        (b'{"tests": []}', "no results of a benchmark"),
        (b'{"schema_version": 99}', "got schema version `99`, wanted `1`"),
        (b'{"schema_version": 1, "started_at": 3}', "`started_at`: Input should be a valid string"),
    ],
)
def test_what_is_no_results_is_said(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "b.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ResultsError):
        read_results(path)
    done = invoke(write(tmp_path, "a.json", results(STEADY)), str(path))
    assert done.exit_code == 2
    assert words in done.output
    assert str(path) in done.output
    assert "hint: " in done.output
