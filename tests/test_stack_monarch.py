"""The stack on Monarch: the losses of the local stack to the bit, and runs that outlive the processes of their parts.

A run has a process of its own: Monarch and vLLM keep to the environment that a process begins with.
"""

from pathlib import Path
from typing import Any

import pytest

from rl.config import LearnerConfig

pytestmark = pytest.mark.timeout(900)


def test_losses_are_those_of_the_local_stack_to_the_bit(stack_run: Any, tmp_path: Path) -> None:
    config = stack_run.config(reproducible=True, updates=20, max_staleness=0, learner=LearnerConfig(learning_rate=2e-4))
    losses = []
    for stack in ("local", "monarch"):
        losses.append(stack_run.events(config.model_copy(update={"stack": stack}), tmp_path / stack).losses)
    assert len(losses[0]) == 20
    assert losses[0] == losses[1]
    assert sum(norm > 0 for _, norm in losses[0]) > 5


def test_a_run_outlives_a_generator_and_its_trainer(stack_run: Any, tmp_path: Path) -> None:
    """With the weights by one-sided reads; and nothing is left of it."""
    config = stack_run.config(stack="monarch", transport="monarch_rdma", updates=30, checkpoint_every=5)
    events = stack_run.events(config, tmp_path / "run", [(3, "generator 0"), (12, "trainer")])
    lost, replaced = events.of("generator_lost"), events.of("generator_replaced")
    assert len(lost) == len(replaced) == 1 and "is gone" in lost[0]["message"]
    assert len(events.of("trainer_lost")) == len(events.of("trainer_replaced")) == 1
    result = events[-1]
    trained = [index for update in result["ledger"]["trained"] for index in update]
    assert result["updates"] == 30 and len(trained) == len(set(trained)) == 60
    assert all(max(one["staleness"]) <= 2 and one["parity"] < 1e-4 for one in events.of("update"))
    processes = stack_run.processes(tmp_path / "run")
    assert len(processes) == 4
    assert not [pid for pid, alive in processes if alive]
