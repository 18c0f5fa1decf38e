"""The page and the table of a benchmark, from synthetic results; the page in a real browser, wide and narrow."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bridge.cli.rl_report import report
from rl.bench.findings import findings, headline
from rl.bench.page.svg import scale, tag
from rl.bench.page.timeline import lanes
from rl.bench.report import page, write_report
from rl.bench.results import (
    Accounting,
    Bound,
    Calibration,
    CalibrationRun,
    CellKey,
    CellRun,
    ControlPlane,
    Machine,
    Mismatch,
    Recovery,
    Results,
    RewardPoint,
    RoleUsage,
    Simulation,
    Span,
    StartUp,
    Transport,
    WeightSync,
)
from rl.bench.table import table
from rl.bench.targets import targets

STACKS = ("local", "ray", "monarch", "hybrid")
TIMES = {"sync-colocated": 0.70, "sync": 0.86, "one-step": 0.63, "async": 0.61}
SLOWER = {"local": 1.0, "ray": 1.01, "monarch": 1.2, "hybrid": 1.02}
GROUPS, GROUP_SIZE, UPDATES, TOKENS = 4, 8, 20, 3200
MACHINE = Machine(
    processor="AMD EPYC 7B13", num_cores=2, memory_bytes=8_200_000_000, system="Linux 6.1", python="3.11.2",
    versions={"ray": "2.60.0", "torch": "2.13.0", "torchmonarch": "0.7.0", "vllm": "0.32.0"},
)  # fmt: skip


def results(**changed: Any) -> Results:
    base = Results(
        started_at="2026-11-22T03:10:00Z",
        duration_s=4210,
        commit="2b27418c0ffee5a1ad0123456789abcdef012345",
        quick=False,
        config={"model": "tiny", "seeds": [0, 1, 2], "updates": UPDATES, "task": {"name": "simple"}},
        machine=MACHINE,
    )
    return base.model_copy(update=changed)


def whole() -> Results:
    keys = [CellKey(stack=stack, mode=mode, max_staleness={"one-step": 1, "async": 4}.get(mode, 0))  # type: ignore[arg-type]
            for stack in STACKS for mode in TIMES]  # fmt: skip
    keys += [CellKey(stack="local", mode="async", max_staleness=2)]
    keys += [CellKey(stack="local", mode=mode, engine="hf", max_staleness=bound)  # type: ignore[arg-type]
             for mode, bound in (("sync", 0), ("async", 4))]  # fmt: skip
    keys += [CellKey(stack="trl", mode="sync-colocated", engine="hf")]
    keys += [CellKey(stack=stack, mode=mode, workload="task", max_staleness=bound)  # type: ignore[arg-type]
             for stack in ("local", "ray") for mode, bound in (("sync", 0), ("async", 4))]  # fmt: skip
    numbers = random.Random(7)
    runs = [run(key, seed, order, numbers) for seed in range(3) for order, key in enumerate(keys)]
    failed = CellKey(stack="monarch", mode="async", workload="task", max_staleness=4)
    runs.append(CellRun(key=failed, seed=0, repeat=0, order=99, load_before=0.4,
                        error="ended after 600 s: `wait_s` <of> update 12 & more"))  # fmt: skip
    calibration = Calibration(generate_saturated_s=0.55, generate_batch_s=0.6, update_s=0.2, snapshot_s=0.001,
                              push_s=0.002, pull_s=0.002, reload_s=0.009, pause_s=0.009)  # fmt: skip
    return results(
        runs=tuple(runs),
        calibrations=(
            CalibrationRun(stack="ray", engine="vllm", colocated=False, seed=0, repeat=0, calibration=calibration),
            CalibrationRun(stack="trl", engine="hf", colocated=True, seed=0, repeat=0, error="there is no such engine"),
        ),
        recoveries=tuple(_recoveries()),
        transports=tuple(_transports(numbers)),
        simulations=tuple(_simulations()),
    )


def run(key: CellKey, seed: int, order: int, numbers: random.Random) -> CellRun:
    """Of a machine on which the generator is the slower role."""
    mean_s = TIMES[key.mode] * SLOWER.get(key.stack, 1.3) * (0.8 if key.engine == "hf" else 1.0)
    mean_s *= 1.02 if key.max_staleness == 2 else 1.0
    times = [mean_s * numbers.uniform(0.93, 1.07) for _ in range(UPDATES)]
    duration, groups = sum(times), GROUPS * UPDATES
    asynchronous, task = key.max_staleness > 0, key.workload == "task"
    staleness = [
        min(key.max_staleness, int(numbers.expovariate(0.9) + 0.6)) if asynchronous else 0 for _ in range(groups)
    ]
    rewards, clock = [], 0.0
    for update in range(60 if task else UPDATES):
        clock += mean_s * numbers.uniform(0.9, 1.1)
        level = 0.85 * (1 - 2.718 ** (-update / 18)) if task else 0.0
        level += numbers.gauss(0, 0.03) if task else 0.0
        rewards.append(RewardPoint(update=update, wall_s=clock, mean_reward=level,
                                   correct_rate=max(0.0, min(1.0, level))))  # fmt: skip
    peer = key.stack == "trl"
    bound = None
    if not (peer or task):
        ideal = mean_s * (0.97 if asynchronous else 0.975)
        formula = "max(W_g/G + T_pause, T_t + T_snapshot)" if asynchronous else "T_g + T_t + T_w"
        bound = Bound(update_s=ideal, formula=formula)
    trained = TOKENS * UPDATES
    return CellRun(
        key=key, seed=seed, repeat=0, order=order + 100 * seed, load_before=numbers.uniform(0.1, 0.6),
        num_updates=UPDATES, update_s=tuple(times), duration_s=duration, trajectories=groups * GROUP_SIZE,
        trained_tokens=trained, generated_tokens=trained + 900 * asynchronous,
        trainer_idle=0.62 if asynchronous else 0.75, generator_idle=0.02 if asynchronous else 0.31,
        overlap=0.98 if asynchronous else 0.0, staleness=tuple(staleness),
        versions_per_trajectory=1.7 if asynchronous else 1.0, wasted_share=0.0,
        accounting=None if peer else Accounting(generated=trained + 900, trained=trained, wasted=0, in_flight=900,
                                                consumed_trajectories=768, distinct_trajectories=768),
        bound=bound,
        weights=None if peer else WeightSync(num_bytes=1_234_432, snapshot_s=0.0006, push_s=0.0015, pull_s=0.0012,
                                             reload_s=0.0085, pause_s=0.0085 if asynchronous else 0.0,
                                             exposed_s=0.0007 if asynchronous else 0.012),
        fresh=None if peer else Mismatch(num_tokens=trained // 2, k3_kl=2e-13, effective_sample_size=1.0,
                                         max_difference=2.4e-6),
        stale=Mismatch(num_tokens=trained // 2, k3_kl=3.1e-4, effective_sample_size=0.994, max_difference=0.21)
        if asynchronous else None,
        control=None if peer else ControlPlane(call_p50_s=0.0004 * SLOWER[key.stack], call_p99_s=0.0021,
                                               messages_per_update=38, bytes_per_update=412_000, overhead_s=0.004),
        start_up=StartUp(open_s=4.1 + 2 * numbers.random(), first_token_s=7.2, first_update_s=8.4),
        usage=() if peer else tuple(
            RoleUsage(role=role, peak_memory_bytes=memory, cpu_s=cpu)  # type: ignore[arg-type]
            for role, memory, cpu in (("loop", 310_000_000, 1.1), ("trainer", 620_000_000, 5.0),
                                      ("generator", 1_410_000_000, 12.2))
        ),
        rewards=tuple(rewards),
        timeline=() if peer else tuple(_timeline(mean_s, asynchronous)),
    )  # fmt: skip


def _timeline(mean_s: float, asynchronous: bool) -> Iterator[Span]:
    for update in range(4):
        begin = update * mean_s
        generated = 0.97 if asynchronous else 0.68
        for group in range(4):
            late = group * 0.22 * mean_s if asynchronous else 0.0
            end = begin + late + mean_s * generated * (0.6 + 0.13 * group)
            yield Span(role="generator 0", kind="generate", begin_s=begin + late, end_s=end, version=update + 3)
        trained = begin + (0.1 if asynchronous else 0.7) * mean_s
        yield Span(role="trainer", kind="update", begin_s=trained, end_s=trained + 0.26 * mean_s, version=update + 3)
        done = trained + 0.26 * mean_s
        yield Span(role="trainer", kind="publish", begin_s=done, end_s=done + 0.012, version=update + 4)
        yield Span(role="generator 0", kind="load", begin_s=done + 0.012, end_s=done + 0.03, version=update + 4)


def _recoveries() -> Iterator[Recovery]:
    for place, stack in enumerate(STACKS):
        for killed, back_s in (("generator", 3.4), ("trainer", 11.0)):
            for seed in range(2):
                took = back_s + 0.3 * place + 0.2 * seed
                yield Recovery(stack=stack, killed=killed, seed=seed, next_update_s=took + 0.9, back_s=took,  # type: ignore[arg-type]
                               samples_lost=0, samples_doubled=0,
                               repeated_updates=2 if killed == "trainer" else 0)  # fmt: skip


def _transports(numbers: random.Random) -> Iterator[Transport]:
    rates = {"memory_copy": 6e9, "shared_memory": 5.4e9, "ray_objects": 0.9e9, "ray_direct": 1.4e9,
             "monarch_rdma": 2.2e9, "monarch_message": 0.4e9, "ray_message": 0.3e9, "file": 1.9e9}  # fmt: skip
    for name, rate in rates.items():
        for num_bytes in (10**6, 10**7, 10**8, 10**9):
            took = num_bytes / rate + (0.0 if name == "memory_copy" else 0.0002)
            yield Transport(
                name=name, num_bytes=num_bytes, seconds=tuple(took * numbers.uniform(0.9, 1.1) for _ in range(5))
            )
    yield Transport(name="ray_message", num_bytes=10**10, seconds=(), error="the message is too large")


def _simulations() -> Iterator[Simulation]:
    for policy, bound in (("pace", 1), ("pace", 4), ("drop", 4)):
        for count in (8, 32, 128, 512, 1024):
            took = 1.0 / (0.99 - 0.02 / bound - 0.00005 * count)
            yield Simulation(placement="simulated", stack="loop", num_generators=count, max_staleness=bound,
                             policy=policy, update_s=took, bound_s=1.0,  # type: ignore[arg-type]
                             wasted_share=0.03 if policy == "drop" else 0.0, staleness_mean=bound * 0.6,
                             trainer_idle=0.02, generator_idle=0.01)  # fmt: skip


SECTIONS = (
    "targets", "findings", "summary", "bound", "speed-up", "learning", "timeline", "staleness", "weights", "control",
    "start-up", "usage", "parity", "accounting", "recovery", "simulation", "failures", "how",
)  # fmt: skip


async def _visit(browser: Any, path: Path, width: int, scheme: str = "light") -> tuple[Any, list[str]]:
    """The page, and everything that it did which it should not."""
    context = await browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened = await context.new_page()
    faults: list[str] = []
    opened.on("console", lambda message: faults.append(f"console: {message.text}"))
    opened.on("pageerror", lambda error: faults.append(f"error: {error}"))
    opened.on("request", lambda request: request.url == path.as_uri() or faults.append(f"request: {request.url}"))
    await opened.goto(path.as_uri())
    return opened, faults


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
async def test_the_page_in_a_browser(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    path = tmp_path / "deep" / "report.html"
    write_report(whole(), path)
    opened, faults = await _visit(browser, path, width, scheme)
    assert faults == []
    assert await opened.evaluate("[...document.querySelectorAll('section')].map(one => one.id)") == list(SECTIONS)
    assert await opened.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
    assert await opened.evaluate("[...document.querySelectorAll('section .none')].length") == 0
    broken = (
        "[...document.querySelectorAll('svg *')].filter(one => [...one.attributes].some(a => /nan|inf/i.test(a.value)))"
    )
    assert await opened.evaluate(f"{broken}.length") == 0
    links = "[...document.querySelectorAll('nav a')].filter(one => !document.querySelector(one.getAttribute('href')))"
    assert await opened.evaluate(f"{links}.length") == 0
    back = await opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(246, 247, 249)" if scheme == "light" else "rgb(14, 17, 22)")
    assert list(path.parent.iterdir()) == [path]


async def test_bars_are_as_long_as_their_numbers_and_bounds_are_before_their_ends(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    found = whole()
    write_report(found, path)
    opened, _ = await _visit(browser, path, 1200)
    rows = await opened.evaluate(
        """[...document.querySelectorAll('#bound figure:first-of-type .bar')].map(bar => {
            const place = one => one ? one.getBoundingClientRect() : null;
            const [track, measured] = [...bar.querySelectorAll('rect')].map(place);
            const bound = place(bar.querySelector('.bound'));
            return [measured.width / track.width, bound && (bound.x + bound.width / 2 - track.x) / track.width]
        })"""
    )
    assert len(rows) == 20
    for measured, bound in rows[:-1]:
        assert 0.95 < bound / measured < 1
    assert rows[-1][1] is None, "the peer has no bound"
    longest = max(measured for measured, _ in rows)
    assert 0.9 < longest <= 1.0


async def test_nothing_measured_is_said(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(results(), path)
    opened, faults = await _visit(browser, path, 390)
    assert faults == []
    texts = await opened.evaluate("[...document.querySelectorAll('section .none')].map(one => one.textContent)")
    assert texts == ["Not measured."] * (len(SECTIONS) - 3) + ["Nothing."], "all but targets and how it was measured"
    badges = await opened.evaluate("[...document.querySelectorAll('.badge')].map(one => one.textContent.trim())")
    assert set(badges) == {"not measured"}


OPTIONAL = ("accounting", "bound", "weights", "fresh", "stale", "control", "start_up", "usage", "rewards", "timeline",
            "staleness", "update_s", "duration_s")  # fmt: skip


@pytest.mark.parametrize("missing", [*((name,) for name in OPTIONAL), OPTIONAL])
def test_what_a_run_does_not_know_is_left_out(missing: tuple[str, ...]) -> None:
    nothing = {name: CellRun.model_fields[name].default for name in missing}
    runs = [run.model_copy(update=nothing) for run in whole().runs if run.key.stack in ("local", "trl")]
    text = page(results(runs=tuple(runs)))
    assert all(f'<section id="{name}">' in text for name in SECTIONS)
    assert "None" not in text and "nan" not in text


def test_what_comes_from_outside_is_text() -> None:
    evil = "<script>alert(1)</script>"
    found = whole()
    failed = found.runs[-1].model_copy(update={"error": evil})
    machine = MACHINE.model_copy(update={"processor": evil})
    text = page(found.model_copy(update={"runs": (*found.runs[:-1], failed), "machine": machine, "commit": evil}))
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 3


def test_targets_are_judged_by_their_numbers() -> None:
    by_name = {target.name: target for target in targets(whole())}
    assert by_name["Async reaches its bound"].state == "reached"
    assert by_name["Weight transport"].state == "partly", "the smallest sizes have a latency"
    assert by_name["No pause of generation"].state == "missed"
    assert by_name["TRL with the same engine"].parts[0].label == "local async ≤4 hf over trl sync-colocated hf"
    assert {target.state for target in targets(results())} == {"not measured"}
    slow = [one.model_copy(update={"duration_s": one.duration_s * 1.1}) for one in whole().runs]
    by_name = {target.name: target for target in targets(results(runs=tuple(slow)))}
    assert by_name["Async reaches its bound"].state == by_name["Sync follows its formula"].state == "missed"


def test_a_lost_sample_misses_the_target_of_recovery() -> None:
    first, *others = whole().recoveries
    lost = first.model_copy(update={"samples_lost": 1})
    target = {one.name: one for one in targets(results(recoveries=(lost, *others)))}["A generator comes back"]
    assert target.state == "partly"
    assert [part.label for part in target.missed] == ["local"]
    assert "1 lost" in target.missed[0].number


def test_findings_claim_nothing_within_the_spread() -> None:
    said = {finding.about: finding.text for finding in findings(whole())}
    assert "do not differ beyond their spread; monarch" in said["stack for async"]
    assert said["async or in turns on the same cores"].startswith(
        "Samples/s of asynchronous training against those in turns on the same cores: more on local 1.4"
    )
    assert "does not differ beyond the spread" in said["learning"]
    assert re.search(r": 1\.4\dx \(1\.\d\d-1\.\d\d\) what it does in turns on the same cores", headline(whole()))
    of_peer = [finding.text for finding in findings(whole()) if finding.about == "TRL"]
    assert ["Our engine lets go of rows that have ended" in text for text in of_peer] == [False, True]
    single = results(runs=tuple(run for run in whole().runs if run.seed == 0))
    said = {finding.about: finding.text for finding in findings(single)}
    assert "no difference beyond the spread" in said["async or in turns on all cores"], "1.14x of one run is nothing"
    assert "One run only" in said["caution"]


def test_a_bound_that_is_beaten_and_tokens_that_vanish_are_cautions() -> None:
    first, *others = whole().runs
    assert first.bound is not None and first.accounting is not None
    fast = first.model_copy(
        update={
            "bound": first.bound.model_copy(update={"update_s": first.bound.update_s * 1.5}),
            "accounting": first.accounting.model_copy(update={"wasted": 7}),
            "trajectories": first.trajectories - GROUP_SIZE,
        }
    )
    texts = [one.text for one in findings(results(runs=(fast,))) if one.about == "caution"]
    assert any("does not add up in: local sync-colocated" in text for text in texts)
    assert any("Faster than their bound" in text for text in texts)
    texts = [one.text for one in findings(results(runs=(fast, *others))) if one.about == "caution"]
    assert any("Not the same number of samples" in text for text in texts)


def test_the_table_is_markdown_with_one_row_a_cell() -> None:
    text = table(whole())
    caption, blank, header, rule, *rows = text.splitlines()
    assert caption.startswith("Median of 3 runs a cell (lowest-highest)")
    assert blank == ""
    assert {line.count(" | ") for line in (header, rule, *rows)} == {10}
    assert len(rows) == 25
    assert re.match(r"\| local sync-colocated \(pinned\) \| 7\d\d ms \(6\d\d-7\d\d ms\) \| 7\d\d ms \|", rows[0])
    assert rows[-1].startswith("| monarch async ≤4 task (pinned) | failed |")
    assert "No cell was measured." in table(results())


def test_the_command_makes_page_and_table_of_what_was_measured(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(whole().model_dump_json())
    made = CliRunner().invoke(report, [str(tmp_path / "results.json")])
    assert made.exit_code == 0 and made.output.startswith(table(whole()))
    assert (tmp_path / "report.html").read_text() == page(whole())
    said = CliRunner().invoke(report, [str(tmp_path / "results.json"), "--output", str(tmp_path / "o.html"), "--json"])
    words = json.loads(said.output)
    assert words["headline"] == headline(whole()) and words["report"] == str(tmp_path / "o.html")
    assert {one["name"]: one["state"] for one in words["targets"]}["Async reaches its bound"] == "reached"
    missing = CliRunner().invoke(report, [str(tmp_path / "nothing.json")])
    assert missing.exit_code != 0 and "cannot read" in str(missing.exception) + missing.output


def test_emulated_cells_are_not_mixed_with_pinned_ones() -> None:
    runs = [
        run.model_copy(update={"key": run.key.model_copy(update={"placement": "emulated", "engine": "emulated"})})
        for run in whole().runs
        if run.key.engine == "vllm" and run.key.workload == "tail"
    ]
    alone = results(runs=tuple(runs))
    assert "emulated" in headline(alone)
    assert "local async ≤4 (emulated)" in table(alone)
    mixed = results(runs=(*whole().runs, *runs))
    assert headline(mixed) == headline(whole())
    assert "<dd>pinned, emulated</dd>" in page(mixed)


def test_pieces_of_work_that_overlap_get_lanes_of_their_own() -> None:
    spans = [Span(role="generator 0", kind="generate", begin_s=begin, end_s=end, version=0)
             for begin, end in ((0, 3), (1, 2), (2, 5), (3, 4))]  # fmt: skip
    assert [[(one.begin_s, one.end_s) for one in row] for row in lanes(spans)] == [[(0, 3), (3, 4)], [(1, 2), (2, 5)]]


def test_scales_and_elements() -> None:
    assert scale([3, 97], zero=True).rounded().ticks() == [0, 25, 50, 75, 100]
    assert scale([2e6, 9e8], log=True).ticks() == [1e6, 1e7, 1e8, 1e9]
    assert scale([5, 5])(5) == 0
    assert tag("text", "<&>", x=1.50, class_="a b", fill=None) == '<text x="1.5" class="a b">&lt;&amp;&gt;</text>'
