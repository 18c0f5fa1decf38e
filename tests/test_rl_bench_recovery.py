"""Recovery as the benchmark measures it: a run that outlives a generator, and what became of its groups."""

from pathlib import Path

import pytest

from rl.bench.config import BenchConfig
from rl.bench.recovery import measure_recovery
from rl.bench.recovery_run import fates
from rl.ledger import Ledger, RunState
from rl.lengths import LengthTail


def test_groups_that_vanished_and_groups_trained_on_again_are_counted() -> None:
    whole = Ledger(trained=((0, 1), (2, 4)), filtered=(3,), dropped=(5,))
    assert fates(RunState(update=2, cursor=8, unfinished=(6, 7), ledger=whole)) == (0, 0)
    assert fates(RunState(update=2, cursor=9, unfinished=(7,), ledger=whole)) == (2, 0)
    again = whole.model_copy(update={"trained": ((0, 1), (1, 4), (1, 2))})
    assert fates(RunState(update=3, cursor=6, ledger=again)) == (0, 2)
    assert fates(RunState(update=2, cursor=6, unfinished=(4,), ledger=whole)) == (0, 1)


def test_what_has_no_process_of_its_own_is_not_killed(tmp_path: Path) -> None:
    found = measure_recovery(BenchConfig(), "local", "generator", 0, tmp_path)
    assert "in the process of the run" in found.error and found.back_s == 0


@pytest.mark.timeout(600)
def test_a_generator_comes_back_and_nothing_is_lost_or_doubled(quick_model: str, tmp_path: Path) -> None:
    config = BenchConfig(
        model=quick_model,
        groups_per_update=2,
        group_size=4,
        groups_in_flight=4,
        lengths=LengthTail(median_tokens=12, max_tokens=32),
        cache_gb=0.05,
        cell_timeout_s=500,
    )
    found = measure_recovery(config, "monarch", "generator", 3, tmp_path)
    assert not found.error
    assert (found.samples_lost, found.samples_doubled, found.repeated_updates) == (0, 0, 0)
    assert 0 < found.back_s <= found.next_update_s
    assert (found.stack, found.killed, found.seed) == ("monarch", "generator", 3)
