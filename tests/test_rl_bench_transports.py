"""The transport benchmark: every way that weights travel, with real processes, and what cannot be measured is said."""

import psutil
import pytest

from rl.bench.links import LINKS
from rl.bench.transports import MEGABYTE, measure_transports


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_every_transport_brings_a_megabyte_over_and_leaves_nothing() -> None:
    found = measure_transports(quick=True, sizes=[MEGABYTE])
    assert [one.name for one in found] == list(LINKS)
    assert [one.error for one in found] == [""] * len(LINKS)
    assert all(one.num_bytes == MEGABYTE and len(one.seconds) == len(one.copy_s) >= 10 for one in found)
    assert all(second > 0 for one in found for second in one.seconds)
    assert all(one.gigabytes_per_s > 0 for one in found)
    copied = {one.name for one in found if any(one.copy_s)}
    assert copied == set(LINKS) - {"memory_copy"}
    assert not [child for child in psutil.Process().children(recursive=True) if "transport_process" in _command(child)]


def _command(process: psutil.Process) -> str:
    """Empty for one that has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def test_weights_that_do_not_fit_into_memory_are_not_tried() -> None:
    found = measure_transports(quick=True, sizes=[2**50])
    assert len(found) == len(LINKS)
    assert all(not one.seconds and one.gigabytes_per_s == 0 and "wanted" in one.error for one in found)
