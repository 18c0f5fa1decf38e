"""The benchmark of RL: what is measured, in which order, what comes of it, and a whole short one."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.cli.main import main
from bridge.cli.rl_bench_view import BenchView
from rl.bench.bound import bound, most_speedup, weights_s
from rl.bench.bounded import bounded
from rl.bench.cautions import cautions
from rl.bench.cells import (
    CalibrationKey,
    Measurement,
    calibration_of,
    cells,
    cores_of,
    run_config,
    schedule,
)
from rl.bench.child import ChildFailed, measure_apart
from rl.bench.config import BenchConfig
from rl.bench.earlier import Earlier
from rl.bench.intervals import length_s, union
from rl.bench.machine import commit, machine
from rl.bench.measure import RunFacts, measured, together
from rl.bench.meter import Meter
from rl.bench.numbers import cell_name, digits
from rl.bench.progress import Progress
from rl.bench.results import Calibration, CalibrationRun, CellKey, CellRun, Machine, Results
from rl.bench.run import RESULTS, extras
from rl.bench.spread import by_cell
from rl.config import EngineConfig, EngineName, LearnerConfig, RunConfig
from rl.lengths import LengthTail
from rl.metrics import RunEvent, UpdateRecord
from rl.pinning import pin, usable_cores
from rl.prompts import PromptSet
from rl.rollout import RolloutSettings
from rl.stack import GroupRequest
from rl.stack import open_stack as open_real_stack
from rl.stacks.scripted import Script, ScriptedStack
from rl.train import train
from rl.types import Batch, Mismatch, TrainMetrics
from steps import StepError
from steps.rl_bench import Params
from steps.rl_bench import run as run_step

PARTS = Calibration(
    generate_saturated_s=0.8,
    generate_batch_s=1.5,
    update_s=1.0,
    snapshot_s=0.01,
    push_s=0.02,
    pull_s=0.03,
    reload_s=0.04,
    pause_s=0.035,
)


def test_bounds_by_hand() -> None:
    assert weights_s(PARTS) == pytest.approx(0.10)
    assert bound("sync", PARTS).update_s == pytest.approx(2.60)
    assert bound("sync-colocated", PARTS).formula == "T_g + T_t + T_w"
    assert bound("async", PARTS).update_s == pytest.approx(1.01)
    generating = PARTS.model_copy(update={"generate_saturated_s": 1.2})
    assert bound("one-step", generating).update_s == pytest.approx(1.235)
    assert most_speedup(PARTS) == pytest.approx(2.60 / 1.01)


def test_a_run_gets_the_bound_of_its_own_stack_mode_and_seed() -> None:
    def calibrated(seed: int, colocated: bool, update_s: float) -> CalibrationRun:
        parts = PARTS.model_copy(update={"update_s": update_s})
        return CalibrationRun(stack="ray", engine="vllm", colocated=colocated, seed=seed, repeat=0, calibration=parts)

    def run(**key: object) -> CellRun:
        whole = CellKey.model_validate({"stack": "ray", "mode": "sync", **key})
        return CellRun(key=whole, seed=1, repeat=0, order=0, load_before=0)

    there = [calibrated(1, False, 1.0), calibrated(1, False, 3.0), calibrated(1, True, 5.0), calibrated(0, False, 9.0)]
    found = bounded(
        [run(), run(mode="sync-colocated"), run(stack="local"), run(workload="task"), run(engine="hf")], there
    )
    assert [one.bound and round(one.bound.update_s, 6) for one in found] == [3.6, 6.6, None, None, None]


def test_lengths_are_the_same_for_all_who_ask_and_have_a_tail() -> None:
    tail = LengthTail(median_tokens=50, sigma=0.8, max_tokens=200)
    lengths = [
        tail.length(seed, f"{group:08d}", sample) for seed in (0, 1) for group in range(300) for sample in range(4)
    ]
    assert lengths == [
        tail.length(seed, f"{group:08d}", sample) for seed in (0, 1) for group in range(300) for sample in range(4)
    ]
    assert median(lengths) == pytest.approx(50, rel=0.1) and fmean(lengths) > 1.2 * median(lengths)
    assert min(lengths) >= 1 and max(lengths) == 200
    assert lengths[:1200] != lengths[1200:]
    assert {LengthTail(sigma=0).length(0, "a", sample) for sample in range(9)} == {48}


def test_every_cell_is_measured_once_by_every_seed_in_an_order_that_turns() -> None:
    config = BenchConfig(seeds=[0, 1], repeats=2, sweep=[0, 1, 2])
    keys, order = cells(config), schedule(config)
    assert len(keys) == len(set(keys)) and len({key.label for key in keys if key.max_staleness != 2}) == len(keys) - 1
    counted = Counter(one.key for one in order if isinstance(one.key, CellKey))
    assert set(counted) == set(keys) and set(counted.values()) == {4}
    passes = [[one for one in order if (one.repeat, one.seed) == which] for which in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert [one for part in passes for one in part] == order, "a pass ends before the next begins"
    assert len({part[-1].key for part in passes}) == 4, "each pass begins elsewhere"
    for part in passes:
        wanted = Counter(calibration_of(key) for key in keys if key.workload == "tail")
        calibrated = {one.key: place for place, one in enumerate(part) if isinstance(one.key, CalibrationKey)}
        assert set(calibrated) == set(wanted) and len(part) == len(keys) + len(wanted)
        for key, place in calibrated.items():
            near = {one.key for one in part[max(0, place - wanted[key]) : place + wanted[key] + 1]}
            of_key = {one for one in keys if one.workload == "tail" and calibration_of(one) == key}
            assert of_key <= near, "a calibration stands among the cells whose bound it makes"


def test_a_cell_is_a_run_with_its_cores_and_its_bound_of_staleness() -> None:
    config = BenchConfig(cores=[3, 5], staleness=6)
    by_mode = {key.mode: run_config(config, key, 4) for key in cells(config) if key.stack == "ray"}
    assert {mode: run.max_staleness for mode, run in by_mode.items()} == {
        "sync-colocated": 0,
        "sync": 0,
        "one-step": 1,
        "async": 6,
    }
    split, colocated = by_mode["async"], by_mode["sync-colocated"]
    assert (split.learner.cores, split.engine.cores, split.engine.num_threads) == ([3], [[5]], 1)
    assert (colocated.learner.cores, colocated.engine.cores, colocated.learner.num_threads) == ([3, 5], [[3, 5]], 2)
    assert split.seed == 4 and not split.evaluate_every
    tail = run_config(config, CellKey(stack="ray", mode="sync"), 0)
    task = run_config(config, CellKey(stack="ray", mode="sync", workload="task"), 0)
    assert tail.rollout.lengths is not None and not tail.filter_zero_variance
    assert task.rollout.lengths is None and task.filter_zero_variance
    assert cores_of(BenchConfig(cores=[0, 1, 2], num_generators=2)) == ([0], [[1], [2]])
    assert cores_of(BenchConfig(cores=[7])) == ([7], [[7]])


def test_emulated_cells_are_about_orchestration_alone() -> None:
    config = BenchConfig(emulate_accelerators=True, num_generators=4)
    keys = cells(config)
    assert {(key.placement, key.engine, key.num_generators, key.workload) for key in keys} == {
        ("emulated", "emulated", 4, "tail")
    }
    run = run_config(config, keys[0], 0)
    assert run.engine.emulation is not None and run.learner.emulation is not None
    assert [extra.part for extra in extras(config)] == ["transports", "simulation"]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40))), st.tuples(st.integers(0, 20), st.integers(20, 40)))
def test_unions_are_the_points_that_any_covers(intervals: list[tuple[int, int]], window: tuple[int, int]) -> None:
    covered = {point for begin, end in intervals for point in range(begin, end) if window[0] <= point < window[1]}
    assert length_s(intervals, window) == len(covered)
    found = union(intervals, window)
    assert all(before[1] < after[0] for before, after in pairwise(found))


def test_a_thread_is_kept_on_its_cores_and_refused_others() -> None:
    before = usable_cores()
    try:
        pin(before[:1])
        assert usable_cores() == before[:1]
        pin(None)
        assert usable_cores() == before[:1]
        with pytest.raises(ValueError, match=r"`cores` is \[9999\]"):
            pin([9999])
    finally:
        pin(before)


async def _scripted(folder: Path, policy: str = "pace", **settings: object) -> tuple[RunConfig, RunFacts]:
    """A run of made-up parts, stopped while work is in flight."""
    config = RunConfig.model_validate(
        {"stack": "scripted", "updates": 1000, "groups_per_update": 2, "group_size": 3, "max_staleness": 2,
         "filter_zero_variance": False, "checkpoint_every": 1000, "stale_policy": policy, **settings}
    )  # fmt: skip
    script = Script(
        generate_s=lambda request: 0.02 + 0.01 * (int(request.group_id) % 3),
        update_s=0.03,
        snapshot_s=0.002,
        push_s=0.002,
        load_s=0.002,
        save_s=0.001,
    )
    stop, records = asyncio.Event(), list[UpdateRecord]()
    last = 7

    def updated(metrics: TrainMetrics) -> None:
        if metrics.update + 1 == last:
            stop.set()

    def report(event: RunEvent) -> None:
        if isinstance(event, UpdateRecord):
            records.append(event)

    @asynccontextmanager
    async def open_stack(config: RunConfig, folder: str = ""):  # type: ignore[no-untyped-def]
        yield ScriptedStack(config, folder, script)

    meter = Meter(updated)
    began_at = time.time()
    result = await train(config, str(folder), report=report, stop=stop, open_stack=meter.metered(open_stack))
    return config, RunFacts(
        trace=meter.trace,
        records=records,
        tokens=result.tokens,
        began_at=began_at,
        usage=(),
        warmup_updates=2,
        num_updates=last - 2,
        num_cores=2,
    )


@pytest.mark.parametrize("policy", ["pace", "drop"])
async def test_the_numbers_of_a_run_agree_with_each_other(tmp_path: Path, policy: str) -> None:
    _, facts = await _scripted(tmp_path, policy, num_generators=2, groups_in_flight=2)
    key = CellKey(stack="scripted", mode="async", max_staleness=2)
    run = measured(CellRun(key=key, seed=0, repeat=0, order=0, load_before=0), facts)
    assert run.num_updates == len(run.update_s) == 5 and sum(run.update_s) == pytest.approx(run.duration_s)
    assert (run.trajectories, run.trained_tokens) == (5 * 2 * 3, 5 * 2 * 3 * 8)
    accounting = run.accounting
    assert accounting is not None and accounting.balanced
    assert accounting.consumed_trajectories == accounting.distinct_trajectories == 7 * 2 * 3
    assert run.wasted_share == (accounting.wasted / accounting.generated)
    assert len(run.staleness) == 10 and 0 <= max(run.staleness) <= 2
    assert 0 <= run.trainer_idle < 1 and 0 <= run.generator_idle < 1 and 0 < run.overlap <= 1
    assert run.control is not None and run.control.messages_per_update >= 2 * (1 + 2)
    assert run.control.bytes_per_update > 1000
    assert run.start_up is not None
    assert 0 <= run.start_up.open_s < run.start_up.first_token_s < run.start_up.first_update_s
    assert [point.update for point in run.rewards] == list(range(7))
    assert {span.kind for span in run.timeline} == {"update", "publish", "generate", "load"}
    assert {span.role for span in run.timeline} == {"trainer", "generator 0", "generator 1"}
    assert CellRun.model_validate_json(run.model_dump_json()) == run


async def test_a_run_that_ended_early_has_no_numbers(tmp_path: Path) -> None:
    _, facts = await _scripted(tmp_path)
    longer = RunFacts(**{**vars(facts), "num_updates": 50})
    key = CellKey(stack="scripted", mode="async", max_staleness=2)
    with pytest.raises(ValueError, match="after 7 of 52 updates"):
        measured(CellRun(key=key, seed=0, repeat=0, order=0, load_before=0), longer)


def test_mismatches_of_several_updates_are_weighted_by_their_tokens() -> None:
    one = Mismatch(num_tokens=10, k3_kl=0.1, effective_sample_size=1.0, max_difference=0.5)
    other = Mismatch(num_tokens=30, k3_kl=0.3, effective_sample_size=0.6, max_difference=0.2)
    both = together([one, None, other])
    assert both is not None and both.num_tokens == 40 and both.max_difference == 0.5
    assert both.k3_kl == pytest.approx(0.25) and both.effective_sample_size == pytest.approx(0.7)
    assert together([None]) is None


async def test_a_child_that_fails_says_why_and_one_that_hangs_is_ended(tmp_path: Path) -> None:
    request = CellKey(stack="local", mode="sync")
    with pytest.raises(ChildFailed, match=r"ended with code 1: .*No module named rl.bench.nothing"):
        await measure_apart("rl.bench.nothing", request, CellKey, tmp_path / "a", 60)
    with pytest.raises(ChildFailed, match="not done within 0"):
        await measure_apart("http.server", request, CellKey, tmp_path / "b", 0.01)


def test_a_child_does_not_outlive_its_parent(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\nfrom rl.bench.child import answer\nfrom rl.bench.results import CellKey\n"
        "print('here', flush=True)\nanswer(CellKey, lambda request: time.sleep(600))\n"
    )
    parent = (
        "import asyncio\nfrom pathlib import Path\nfrom rl.bench.child import measure_apart\n"
        "from rl.bench.results import CellKey\n"
        f"folder = Path({str(tmp_path / 'run')!r})\n"
        "asyncio.run(measure_apart('slow', CellKey(stack='x', mode='sync'), CellKey, folder, 600))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}{os.pathsep}{tmp_path}"}
    process = subprocess.Popen([sys.executable, "-c", parent], env=environment, start_new_session=True)
    said = tmp_path / "run" / "output.log"
    deadline = time.monotonic() + 120
    while not (said.exists() and "here" in said.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    import psutil

    (child,) = psutil.Process(process.pid).children()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    gone, alive = psutil.wait_procs([child], timeout=30)
    assert gone and not alive


def _results(config: BenchConfig, error: str = "") -> Results:
    """One measured cell, one calibration that failed where `error` says why."""
    cell = next(one.key for one in schedule(config) if isinstance(one.key, CellKey))
    calibration = next(one.key for one in schedule(config) if isinstance(one.key, CalibrationKey))
    calibrated = CalibrationRun(**calibration.model_dump(), seed=0, repeat=0, error=error)
    numbers = {"num_updates": 2, "update_s": (1.0, 3.0), "duration_s": 4.0, "trajectories": 64, "trained_tokens": 640}
    return Results(
        started_at="2026-01-01T00:00:00+00:00",
        duration_s=1,
        commit="",
        quick=False,
        config=config.model_dump(mode="json"),
        machine=Machine(processor="", num_cores=2, memory_bytes=1, system="", python="", versions={}),
        runs=(CellRun(key=cell, seed=0, repeat=0, order=3, load_before=0, **numbers),),
        calibrations=(calibrated if error else calibrated.model_copy(update={"calibration": PARTS}),),
    )


def test_what_was_measured_before_is_found_by_what_is_asked_for(tmp_path: Path) -> None:
    config = BenchConfig(seeds=[0])
    cell = next(one for one in schedule(config) if isinstance(one.key, CellKey))
    calibration = next(one for one in schedule(config) if isinstance(one.key, CalibrationKey))
    results = _results(config, error="it broke")
    (good,) = results.runs
    assert results.num_failed == 1
    path = tmp_path / "results.json"
    path.write_text(results.model_dump_json())

    def found(
        wanted: Measurement,
        config: BenchConfig,
        path: Path = path,
        machine: Machine = results.machine,
        commit: str = "",
    ) -> bool:
        return Earlier(path, config, machine, commit).has(wanted)

    assert found(cell, config)
    assert not found(calibration, config)
    assert not found(cell, BenchConfig(seeds=[0], updates=3))
    assert not found(cell, config, tmp_path / "nowhere")
    assert not found(cell, config, commit="another")
    assert not found(cell, config, machine=results.machine.model_copy(update={"num_cores": 96}))

    more = BenchConfig(seeds=[1], parts=["matrix"])
    earlier = Earlier(path, more, results.machine, "")
    assert earlier.has(cell) and not earlier.has(cell.model_copy(update={"seed": 1}))
    assert earlier.results is not None and earlier.results.runs == (good,)
    settings = earlier.with_its_own(more.model_dump(mode="json"))
    assert settings["seeds"] == [0, 1] and settings["parts"] == [*config.parts]


@pytest.mark.parametrize("name", ["vllm", "hf"])
async def test_engines_sample_lengths_that_are_given_on_the_cores_that_are_given(
    quick_model: str, name: EngineName
) -> None:
    tail, core = LengthTail(median_tokens=12, sigma=0.9, max_tokens=40), usable_cores()[-1]
    config = RunConfig(
        model=quick_model,
        rollout=RolloutSettings(prompt_style="brief", max_turns=1, max_tokens=200, lengths=tail),
        engine=EngineConfig(name=name, cache_gb=0.05, max_model_tokens=256, cores=[[core]]),
        learner=LearnerConfig(cores=[core]),
    )
    prompt = PromptSet(config.tasks, "train", 0)[0]
    request = GroupRequest(group_id="00000000", prompt=prompt, group_size=6, seed=3, settings=config.rollout)
    async with open_real_stack(config) as stack:
        group = await stack.generators[0].generate(request)
        metrics = await stack.trainer.update(Batch(update=0, version=0, groups=(group,)))
        (engine,) = [one.native_id for one in threading.enumerate() if one.name.startswith("engine")]
        assert os.sched_getaffinity(engine or 0) == {core}
        threads = Path(f"/proc/{await stack.trainer.ping()}/task").iterdir()  # type: ignore[attr-defined]
        assert {core} in [os.sched_getaffinity(int(one.name)) for one in threads]
    assert [one.num_sampled for one in group.trajectories] == [
        tail.length(3, "00000000", sample) for sample in range(6)
    ]
    assert all(one.stop_reason in ("max_tokens", "answer") and not one.num_discarded for one in group.trajectories)
    assert metrics.fresh is not None and metrics.stale is None
    assert metrics.fresh.num_tokens == metrics.num_tokens and metrics.fresh.max_difference < 1e-3
    assert metrics.fresh.k3_kl == pytest.approx(metrics.k3_kl, abs=1e-9)


def test_faults_of_the_settings_are_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "never")]
    assert main(["rl", "bench", "--stacks", "local,rey", *output]) == 2
    assert "`--stacks`: `stacks[1]`: got `rey`, wanted one of" in capsys.readouterr().err
    assert main(["rl", "bench", "--set", "lengths.sigma=-1", *output]) == 2
    assert "`--set`: `sigma`: got `-1`" in capsys.readouterr().err
    assert main(["rl", "bench", "--resume"]) == 2
    assert "`--resume` wants the folder" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_the_schema_of_the_results_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rl", "bench", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$defs"]["CellRun"]["properties"]["num_updates"]["description"] == "Measured, without warm-up."


def test_a_step_measures_only_what_is_missing(step_context: Callable[..., Any], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"stacks": ["local"], "modes": ["sync"], "parts": ["matrix"], "seeds": [0]}
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / RESULTS).write_text(_results(BenchConfig(**settings, model="./nowhere")).model_dump_json())
    with pytest.raises(StepError, match=r"there is no model `\./nowhere`"):
        run_step(Params(**settings, model="./nowhere", folder="out", updates=3), step_context())
    quick = {**settings, "model": str(_model_of_nothing(tmp_path))}
    here = {"machine": machine(), "commit": commit()}
    (folder / RESULTS).write_text(_results(BenchConfig(**quick)).model_copy(update=here).model_dump_json())
    outputs = run_step(Params(**quick, folder="out"), step_context())
    assert outputs["num_runs"] == 1 and outputs["num_failed"] == 0
    assert "| local sync" in outputs["table"]
    assert Path(outputs["report"]).stat().st_size > 10_000 and outputs["results"] == str(folder / RESULTS)


def _model_of_nothing(folder: Path) -> Path:
    """A folder that is taken for a model as long as nobody loads it."""
    (folder / "model").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / "model" / name).write_text("{}")
    return folder / "model"


def test_lines_stay_and_say_what_failed() -> None:
    stream = io.StringIO()
    view = BenchView(stream)
    view.add(Progress(done=0, total=2, text="local sync"))
    assert "0/2" in view.picture() and "local sync" in view.picture()
    view.add(Progress(done=1, total=2, text="local sync: 1.2 s an update", found=True))
    view.add(Progress(done=2, total=2, text="ray sync: it broke\x1b[2J", found=True, failed=True))
    view.close()
    first, second = stream.getvalue().splitlines()
    assert first.endswith("[1/2] local sync: 1.2 s an update")
    assert second.endswith("[2/2] failed  ray sync: it broke")


@pytest.mark.timeout(600)
def test_a_quick_benchmark_accounts_for_everything(quick_model: str, tmp_path: Path) -> None:
    """The whole command, with real models, on two stacks."""
    command = [
        *(sys.executable, "-m", "bridge.cli.main", "rl", "bench", "--quick", "--model", quick_model),
        *("--parts", "matrix,simulation", "--output", str(tmp_path / "out"), "--json"),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        said, noted = process.communicate(timeout=580)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, noted
    results = Results.model_validate_json((tmp_path / "out" / "results.json").read_text())
    assert json.loads(said)["measured"] == len(results.runs) and results.quick
    assert results.machine.num_cores and results.machine.versions["torch"] and not results.num_failed
    labels = {run.key.label: run for run in results.runs}
    cautioned = " ".join(one.text for one in cautions(results, by_cell(results.runs)))
    assert {"local sync", "local async", "ray sync", "ray async"} == set(labels)
    for run in results.runs:
        accounting = run.accounting
        assert accounting is not None and accounting.balanced, run.key.label
        assert accounting.generated == accounting.trained + accounting.wasted + accounting.in_flight
        assert run.num_updates == 6 and run.wasted_share == 0
        assert max(run.staleness) <= run.key.max_staleness
        # Nothing is faster than its bound; where others computed here during the calibration, a reader is told.
        assert run.efficiency is not None and run.efficiency > 0
        told = f"{cell_name(run.key)} {digits(run.efficiency)}" in cautioned
        assert told == (run.efficiency > 1), f"{run.key.label}: {run.efficiency}"
        assert run.fresh is not None or run.stale is not None
        for kind in (run.fresh, run.stale):
            assert kind is None or kind.max_difference < 0.1
        assert run.control is not None and run.control.call_p50_s > 0
        assert {one.role for one in run.usage} == {"loop", "trainer", "generator"}
    assert len({run.trajectories for run in results.runs}) == 1, "fresh trajectories are equal across cells"
    assert len({run.trained_tokens for run in results.runs}) == 1, "and so are their lengths"
    assert labels["ray sync"].control.call_p50_s > labels["local sync"].control.call_p50_s  # type: ignore[union-attr]
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
