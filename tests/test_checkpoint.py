"""Checkpoints are whole or not there, and a run that is killed at any moment ends as if it had not been."""

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.checkpoint import STATE, TRAINER, Checkpoints, read_state, trainer_folder
from rl.config import RunConfig
from rl.ledger import Ledger, RunState
from rl.metrics import EVALUATIONS, METRICS
from rl.stacks.scripted import ScriptedStack
from rl.train import RunBusy, RunRefused, RunResult, train
from rl.virtual_clock import run_virtually

CONFIG = RunConfig.model_validate(
    {
        "stack": "scripted",
        "updates": 10,
        "groups_per_update": 2,
        "group_size": 4,
        "groups_in_flight": 3,
        "num_generators": 2,
        "checkpoint_every": 3,
        "evaluate_every": 4,
        "evaluation_prompts": 2,
    }
)


class Trainer:
    """Only saves; a name that is to be written is given, or an error to raise halfway."""

    def __init__(self, weights: str, error: BaseException | None = None) -> None:
        self._weights, self._error = weights, error

    async def save(self, folder: str) -> None:
        Path(folder, "weights").write_text(self._weights)
        if self._error is not None:
            raise self._error
        Path(folder, "optimizer").write_text(self._weights)


async def save(checkpoints: Checkpoints, update: int, trainer: Trainer) -> Path:
    return await checkpoints.save(RunState(update=update, cursor=7), trainer)  # type: ignore[arg-type]


async def test_a_trainer_that_saves_elsewhere_costs_no_checkpoint(tmp_path: Path) -> None:
    class Elsewhere:
        async def save(self, folder: str) -> None:
            """On another machine."""

    checkpoints = Checkpoints(tmp_path)
    saved = await save(checkpoints, 1, Trainer("weights"))
    with pytest.raises(OSError, match="its machine does not see this folder"):
        await checkpoints.save(RunState(update=2), Elsewhere())  # type: ignore[arg-type]
    assert checkpoints.newest() == saved


async def test_the_newest_is_found_and_the_older_ones_go(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest() is None
    saved = [await save(checkpoints, update, Trainer(str(update))) for update in (0, 9, 10, 200)]
    assert checkpoints.newest() == saved[-1]
    assert read_state(saved[-1]) == RunState(update=200, cursor=7)
    assert Path(trainer_folder(saved[-1]), "weights").read_text() == "200"
    assert [path.exists() for path in saved] == [False, False, True, True]


@pytest.mark.parametrize("error", [OSError("no space left"), asyncio.CancelledError()])
async def test_a_checkpoint_that_is_not_finished_is_not_there(tmp_path: Path, error: BaseException) -> None:
    checkpoints = Checkpoints(tmp_path)
    first = await save(checkpoints, 1, Trainer("1"))
    with pytest.raises(type(error)):
        await save(checkpoints, 2, Trainer("2", error))
    assert checkpoints.newest() == first
    second = await save(checkpoints, 2, Trainer("2"))
    assert checkpoints.newest() == second
    assert sorted(path.name for path in second.iterdir()) == sorted([STATE, TRAINER])
    assert {path.name for path in first.parent.iterdir()} == {first.name, second.name}


@asynccontextmanager
async def scripted(config: RunConfig, folder: str) -> AsyncIterator[ScriptedStack]:
    yield ScriptedStack(config, folder)


async def _kill_after(folder: Path, after_s: float) -> None:
    running = asyncio.create_task(train(CONFIG, str(folder), True, open_stack=scripted))
    await asyncio.wait([running], timeout=after_s)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def finish(folder: Path) -> RunResult:
    return run_virtually(train(CONFIG, str(folder), True, open_stack=scripted))


def check(folder: Path, result: RunResult, wanted: RunResult) -> None:
    """The same ledger in the run and in the weights, every prompt with one fate, one line per update."""
    assert result.ledger == wanted.ledger
    weights = json.loads(Path(result.checkpoint, TRAINER, "trained.json").read_text())
    assert Ledger(trained=tuple(map(tuple, weights))).trained == wanted.ledger.trained
    trained = [index for update in result.ledger.trained for index in update]
    assert sorted([*trained, *result.ledger.filtered]) == list(range(read_state(Path(result.checkpoint)).cursor))
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    assert [line["train"]["update"] for line in lines] == list(range(CONFIG.updates))
    versions = [json.loads(line)["version"] for line in (folder / EVALUATIONS).read_text().splitlines()]
    assert versions == [0, 4, 8, 10]
    tokens = result.tokens
    assert tokens.generated == tokens.trained + tokens.wasted


@cache
def undisturbed() -> RunResult:
    with TemporaryDirectory() as folder:
        return finish(Path(folder))


@settings(deadline=None, max_examples=12)
@given(st.lists(st.floats(0.01, 40), min_size=1, max_size=3))
def test_killed_at_any_moment_nothing_is_lost_or_trained_on_twice(kills: list[float]) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        for after_s in kills:
            run_virtually(_kill_after(folder, after_s))
        check(folder, finish(folder), undisturbed())


CHILD = """
import asyncio, sys
from contextlib import asynccontextmanager
from rl.config import RunConfig
from rl.stacks.scripted import Script, ScriptedStack
from rl.train import train

quick = {name: 0.001 for name in ("update_s", "snapshot_s", "push_s", "load_s", "save_s")}
script = Script(generate_s=lambda request: 0.002, **quick)

@asynccontextmanager
async def open_stack(config, folder):
    yield ScriptedStack(config, folder, script)

def say(event):
    print(event.event, flush=True)

asyncio.run(train(RunConfig.model_validate_json(sys.argv[1]), sys.argv[2], True, say, open_stack=open_stack))
"""


def test_a_process_that_is_killed_resumes(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(3):
        command = [sys.executable, "-c", CHILD, CONFIG.model_dump_json(), str(tmp_path)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for _ in range(rng.randrange(2, 9)):
            child.stdout.readline()  # empty where it was fast, and is done
        child.kill()
        child.communicate()
    check(tmp_path, finish(tmp_path), undisturbed())


def test_a_run_is_not_taken_for_another(tmp_path: Path) -> None:
    done = finish(tmp_path)
    assert finish(tmp_path) == done
    with pytest.raises(RunRefused, match=r"has a run of its own already\n\nhint: resume it"):
        run_virtually(train(CONFIG, str(tmp_path), open_stack=scripted))
    other = CONFIG.model_copy(update={"seed": 1})
    with pytest.raises(RunRefused, match="has another run: `seed` was `0` and is `1`"):
        run_virtually(train(other, str(tmp_path), True, open_stack=scripted))
    longer = run_virtually(train(CONFIG.model_copy(update={"updates": 12}), str(tmp_path), True, open_stack=scripted))
    assert longer.updates == 12 and longer.ledger.trained[:10] == done.ledger.trained


async def test_two_do_not_run_in_one_folder(tmp_path: Path) -> None:
    first = asyncio.create_task(train(CONFIG, str(tmp_path), open_stack=scripted))
    await asyncio.sleep(0)
    with pytest.raises(RunBusy, match=r"a run goes on in `.*`\n\nhint: wait for its end"):
        await train(CONFIG, str(tmp_path), True, open_stack=scripted)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert (await train(CONFIG, str(tmp_path), True, open_stack=scripted)).updates == CONFIG.updates


def test_the_stack_is_found_by_its_name(tmp_path: Path) -> None:
    assert run_virtually(train(CONFIG, str(tmp_path))).updates == 10
    assert "ORCHESTRATE_RL_STACKS" not in os.environ
