"""What is written down about a run: shares of time, lines, and what TensorBoard reads."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from rl.busy import BusyTime
from rl.config import RunConfig
from rl.metrics import EVALUATIONS, METRICS, TENSORBOARD, RunEvent, RunLog
from rl.train import train
from rl.virtual_clock import run_virtually

CONFIG = RunConfig(stack="scripted", updates=3, groups_per_update=2, group_size=4, evaluation_prompts=2)


def test_shares_of_time() -> None:
    now = [0.0]
    busy = BusyTime(2, lambda: now[0])
    with busy.generator(0):
        now[0] = 2.0
        with busy.generator(0), busy.trainer():
            now[0] = 3.0
    with busy.trainer():
        now[0] = 5.0
        with busy.generator(1):
            now[0] = 6.0
    now[0] = 8.0
    shares = busy.shares()
    assert shares.duration_s == 8
    assert shares.trainer_idle == pytest.approx(1 - 4 / 8)
    assert shares.generator_idle == pytest.approx(1 - (3 + 1) / 2 / 8)
    assert shares.overlap == pytest.approx((4 + 4 - 6) / 4)
    assert busy.shares().duration_s == 0


def test_a_run_is_written_down_and_can_be_rewound(tmp_path: Path) -> None:
    events: list[RunEvent] = []
    run_virtually(train(CONFIG, str(tmp_path), report=events.append))
    path = tmp_path / METRICS
    assert len(path.read_text().splitlines()) == 3 and len((tmp_path / EVALUATIONS).read_text().splitlines()) == 1
    with path.open("a") as file:
        file.write('{"train": {"upd')
    again: list[RunEvent] = []
    log = RunLog(tmp_path, again.append, update=2)
    assert len(path.read_text().splitlines()) == 2 and (tmp_path / EVALUATIONS).read_text() == ""
    last = next(event for event in reversed(events) if event.event == "update")
    log(last)
    log.close()
    assert len(path.read_text().splitlines()) == 3
    assert again[0].model_dump(exclude={"at"}) == last.model_dump(exclude={"at"})


def test_tensorboard_reads_the_same_numbers(tmp_path: Path) -> None:
    events: list[RunEvent] = []
    run_virtually(train(CONFIG, str(tmp_path), report=events.append))
    rewards = {event.train.update: event.train.mean_reward for event in events if event.event == "update"}
    (file,) = (tmp_path / TENSORBOARD).iterdir()
    found: dict[int, float] = {}
    tags: set[str] = set()
    for entry in EventFileLoader(str(file)).Load():
        for value in entry.summary.value:
            tags.add(value.tag)
            if value.tag == "train/mean_reward":
                found[entry.step] = value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value
    assert found == pytest.approx(rewards)
    assert {"phases/wait_s", "shares/overlap", "evaluation/accuracy", "tokens/generated"} <= tags
