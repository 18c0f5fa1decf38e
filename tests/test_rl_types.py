"""What flows through a run: shapes are checked, nothing changes, everything survives JSON and pickle."""

import asyncio
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rl.rollout import RolloutSettings, rollout_group
from rl.scripted import RandomEngine, ScriptedEngine
from rl.tokenizer import TinyTokenizer
from rl.types import Batch, Group, Prompt, Task, TrainMetrics, Trajectory
from rl.zorplex import open_task

TOKENIZER = TinyTokenizer()
PROMPT = next(open_task(Task(name="compositional"), 42).prompts())


def group(version: int = 0, name: str = "1") -> Group:
    engine, settings = RandomEngine(TOKENIZER, version), RolloutSettings(prompt_style="brief", max_tokens_per_turn=9)
    return asyncio.run(rollout_group(engine, TOKENIZER, PROMPT, settings, group_id=name, group_size=3))


def trajectory(**changes: object) -> Trajectory:
    plain = dict(group().trajectories[0])
    return Trajectory.model_validate({**plain, **changes})


def test_the_sequences_of_a_trajectory_belong_together() -> None:
    with pytest.raises(ValidationError, match=r"must be equally long, got \[\d+, \d+, 1, \d+\]"):
        trajectory(logprobs=(0.0,))
    count = len(trajectory().token_ids)
    with pytest.raises(ValidationError, match="a weight version if and only if the loss mask is True"):
        trajectory(versions=(0,) * count)
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        trajectory(colour="red")


def test_nothing_changes() -> None:
    with pytest.raises(ValidationError, match="Instance is frozen"):
        PROMPT.answer = 3  # type: ignore[misc]


def test_everything_survives_json_and_pickle() -> None:
    batch = Batch(update=3, version=4, groups=(group(1), group(2, "2")))
    assert Batch.model_validate_json(batch.model_dump_json()) == batch
    assert pickle.loads(pickle.dumps(batch)) == batch


@given(st.lists(st.floats(allow_nan=False, max_value=0.0), min_size=1, max_size=5))
def test_logprobs_survive_to_the_last_bit(logprobs: list[float]) -> None:
    count = len(logprobs)
    changed = trajectory(token_ids=(0,) * count, loss_mask=(True,) * count, versions=(0,) * count, logprobs=logprobs)
    back = Trajectory.model_validate_json(changed.model_dump_json())
    assert [one.hex() for one in back.logprobs] == [one.hex() for one in logprobs]


def test_versions_and_staleness() -> None:
    mixed = trajectory(
        token_ids=(1, 2, 3, 4), loss_mask=(False, True, True, True), logprobs=(0.0,) * 4, versions=(-1, 5, 5, 6)
    )
    assert (mixed.oldest_version, mixed.newest_version, mixed.num_sampled) == (5, 6, 3)
    unsampled = trajectory(token_ids=(1,), loss_mask=(False,), logprobs=(0.0,), versions=(-1,))
    assert (unsampled.oldest_version, unsampled.newest_version) == (None, None)
    one = Group(id="1", prompt=PROMPT, trajectories=(mixed, unsampled))
    batch = Batch(update=0, version=8, groups=(one, group(7, "2")))
    assert (one.oldest_version, batch.staleness) == (5, (3, 1))
    assert [found.group_id for found in batch.trajectories] == ["1", "1", "2", "2", "2"]


def test_a_group_is_informative_when_its_rewards_differ() -> None:
    settings = RolloutSettings(prompt_style="brief")
    engine = ScriptedEngine(TOKENIZER, lambda text: "[ANSWER] 125")
    right = asyncio.run(rollout_group(engine, TOKENIZER, PROMPT, settings, group_id="1", group_size=2))
    assert not right.informative
    assert Group(id="1", prompt=PROMPT, trajectories=(*right.trajectories, trajectory())).informative


def test_labels_and_ids() -> None:
    labels = [Task(name="simple"), Task(name="compositional", difficulty="hard"), Task(name="recursive", max_depth=2)]
    assert [task.label for task in labels] == ["simple", "compositional/hard", "recursive/2"]
    assert PROMPT.id == "compositional/easy:42:0"
    assert Prompt.model_validate_json(PROMPT.model_dump_json()) == PROMPT


def test_metrics_tell_whether_an_update_is_sound() -> None:
    counted = dict.fromkeys(TrainMetrics.model_fields.keys() - {"fresh", "stale"}, 1)
    assert TrainMetrics.model_validate(counted).finite
    assert not TrainMetrics.model_validate({**counted, "loss": math.nan}).finite
    back = TrainMetrics.model_validate_json(
        TrainMetrics.model_validate({**counted, "loss": math.inf}).model_dump_json()
    )
    assert back.loss == math.inf
