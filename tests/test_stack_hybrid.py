"""A Monarch trainer with Ray generators: the losses of the local stack to the bit, through losses of both parts.

A run has a process of its own: Monarch, Ray and vLLM keep to the environment that a process begins with.
"""

from pathlib import Path
from typing import Any

import pytest

from rl.config import LearnerConfig, RunConfig
from rl.stack import open_stack

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def test_losses_are_those_of_the_local_stack_to_the_bit_whatever_is_lost(stack_run: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"updates": 20, "max_staleness": 0, "checkpoint_every": 5}
    config = stack_run.config(reproducible=True, learner=LearnerConfig(learning_rate=2e-4), **settings)
    local = stack_run.events(config, tmp_path / "local").of("update")
    hybrid = config.model_copy(update={"stack": "hybrid"})
    events = stack_run.events(hybrid, tmp_path / "hybrid", [(3, "generator 0"), (12, "trainer")])
    assert [len(events.of(f"{part}_replaced")) for part in ("generator", "trainer")] == [1, 1]
    losses = {one["train"]["update"]: (one["train"]["loss"], one["train"]["gradient_norm"]) for one in local}
    assert len(losses) == 20 and sum(norm > 0 for _, norm in losses.values()) > 5
    updates = [one["train"] for one in events.of("update")]
    assert {one["update"] for one in updates} == set(losses)
    assert all(losses[one["update"]] == (one["loss"], one["gradient_norm"]) for one in updates)


async def test_a_store_that_one_half_cannot_reach_is_refused() -> None:
    with pytest.raises(ValueError, match="`transport` is `ray_objects`, which one half of stack `hybrid`"):
        async with open_stack(RunConfig(stack="hybrid", transport="ray_objects")):
            raise AssertionError
