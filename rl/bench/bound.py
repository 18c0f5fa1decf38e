"""The shortest time of an update that the parts allow, by what each takes alone.

Symbols: G generators; W_g generating work of one update; T_g from idle generators to the last of its tokens; T_t one
optimizer step; T_snapshot copying the weights aside, T_push making the copy readable, T_pull and T_reload bringing it
into the engine, which samples nothing for T_p of it.

The loop copies weights aside in the trainer and does all else beside the next update; requests run on while weights
change. So of asynchronous training what is left is its slower side: AReaL (arXiv 2505.24298) and PipelineRL (arXiv
2509.19128) argue the same. The tail of the lengths is in T_g, which waits for the longest sample, and not in W_g / G,
where other samples fill its place.
"""

from rl.bench.results import Bound, Calibration, Mode


def bound(mode: Mode, parts: Calibration) -> Bound:
    """For one update in this mode; for `sync-colocated`, `parts` are calibrated with all cores for each role."""
    if mode in ("sync", "sync-colocated"):
        return Bound(update_s=synchronous_s(parts), formula="T_g + T_t + T_w")
    return Bound(update_s=asynchronous_s(parts), formula="max(W_g/G + T_p, T_t + T_snapshot)")


def synchronous_s(parts: Calibration) -> float:
    """`T_g + T_t + T_w`, all in turns: T_w is snapshot, push, pull and reload."""
    return parts.generate_batch_s + parts.update_s + weights_s(parts)


def asynchronous_s(parts: Calibration) -> float:
    """`max(W_g/G + T_p, T_t + T_snapshot)`: the slower role never waits, and the other one is hidden behind it.

    Holds for a staleness of 1 too, whose time lies between this and that of `synchronous_s`.
    """
    return max(parts.generate_saturated_s + parts.pause_s, parts.update_s + parts.snapshot_s)


def weights_s(parts: Calibration) -> float:
    """T_w: from the trainer's memory into every engine, nothing else going on."""
    return parts.snapshot_s + parts.push_s + parts.pull_s + parts.reload_s


def most_speedup(parts: Calibration) -> float:
    """Of asynchronous over synchronous training with the same split: with neither tail nor weights at most 2, and that
    where both roles take equally long."""
    return synchronous_s(parts) / asynchronous_s(parts)
