"""What is read off one run: a name, a unit, which direction is better, and how. Table, report and comparison share it.

CellRun -> Metric.of -> number, or None where the run does not know
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from rl.bench.results import CellRun, Role
from rl.bench.spread import Spread, percentile, samples_per_s, spread_of

Better = Literal["lower", "higher", "neither"]
Unit = Literal["s", "share", "1/s", "bytes", "bytes/s", "versions", "nats", "", "groups"]


@dataclass(frozen=True)
class Metric:
    """One number of a run."""

    name: str
    """As in `orchestrate rl compare --json`."""
    title: str
    unit: Unit
    better: Better
    of: Callable[[CellRun], float | None]

    def over(self, runs: Iterable[CellRun]) -> Spread | None:
        """Of a cell."""
        return spread_of(self.of(run) for run in runs)


def update_mean_s(run: CellRun) -> float | None:
    """Mean time of an update."""
    return run.duration_s / run.num_updates if run.num_updates else None


def exposed_share(run: CellRun) -> float | None:
    """Of an update's time, what the trainer waited for weights."""
    mean_s = update_mean_s(run)
    return run.weights.exposed_s / mean_s if run.weights and mean_s else None


def pause_share(run: CellRun) -> float | None:
    """Of an update's time, what generation stood still while the engine took weights in."""
    mean_s = update_mean_s(run)
    return run.weights.pause_s / mean_s if run.weights and mean_s else None


def overhead_share(run: CellRun) -> float | None:
    """Of an update's time, what orchestration took."""
    mean_s = update_mean_s(run)
    return run.control.overhead_s / mean_s if run.control and mean_s else None


def weights_per_s(run: CellRun) -> float | None:
    """Bytes a second from the trainer's memory into the engine: snapshot, push, pull and reload."""
    if run.weights is None:
        return None
    took_s = run.weights.snapshot_s + run.weights.push_s + run.weights.pull_s + run.weights.reload_s
    return run.weights.num_bytes / took_s if took_s > 0 else None


def peak_memory(role: Role) -> Callable[[CellRun], float | None]:
    """Of a role's processes together."""
    return lambda run: next((one.peak_memory_bytes for one in run.usage if one.role == role), None)


def cpu_s(role: Role) -> Callable[[CellRun], float | None]:
    """Of a role's processes, for one update."""
    return lambda run: next((one.cpu_s / run.num_updates for one in run.usage if one.role == role), None)


def _per_core(tokens: int, run: CellRun) -> float | None:
    return tokens / run.duration_s / run.num_cores if run.duration_s > 0 else None


def _weights(read: Callable[..., float]) -> Callable[[CellRun], float | None]:
    return lambda run: None if run.weights is None else read(run.weights)


def _control(read: Callable[..., float]) -> Callable[[CellRun], float | None]:
    return lambda run: None if run.control is None else read(run.control)


def _start_up(read: Callable[..., float]) -> Callable[[CellRun], float | None]:
    return lambda run: None if run.start_up is None else read(run.start_up)


UPDATE_P50 = Metric("update_p50_s", "update time p50", "s", "lower", lambda run: percentile(run.update_s, 0.5))
UPDATE_P95 = Metric("update_p95_s", "update time p95", "s", "lower", lambda run: percentile(run.update_s, 0.95))
UPDATE_MEAN = Metric("update_mean_s", "update time, mean", "s", "lower", update_mean_s)
SAMPLES = Metric("samples_per_s", "samples/s", "1/s", "higher", samples_per_s)
TRAINED = Metric("trained_tokens_per_s_core", "trained tokens/s per core", "1/s", "higher",
                 lambda run: _per_core(run.trained_tokens, run))  # fmt: skip
GENERATED = Metric("generated_tokens_per_s_core", "generated tokens/s per core", "1/s", "neither",
                   lambda run: _per_core(run.generated_tokens, run))  # fmt: skip
EFFICIENCY = Metric("efficiency", "efficiency against the bound", "share", "higher", lambda run: run.efficiency)
BOUND = Metric("bound_s", "bound", "s", "neither", lambda run: run.bound.update_s if run.bound else None)
TRAINER_IDLE = Metric("trainer_idle", "trainer idle", "share", "neither", lambda run: run.trainer_idle)
GENERATOR_IDLE = Metric("generator_idle", "generator idle", "share", "neither", lambda run: run.generator_idle)
OVERLAP = Metric("overlap", "overlap", "share", "neither", lambda run: run.overlap)
STALENESS_MEAN = Metric("staleness_mean", "staleness, mean", "versions", "neither",
                        lambda run: sum(run.staleness) / len(run.staleness) if run.staleness else None)  # fmt: skip
STALENESS_P95 = Metric("staleness_p95", "staleness p95", "versions", "neither",
                       lambda run: percentile(run.staleness, 0.95))  # fmt: skip
STALENESS_MAX = Metric("staleness_max", "staleness, highest", "versions", "neither",
                       lambda run: max(run.staleness, default=None))  # fmt: skip
VERSIONS = Metric("versions_per_trajectory", "versions per trajectory", "versions", "neither",
                  lambda run: run.versions_per_trajectory)  # fmt: skip
WASTED = Metric("wasted_share", "wasted tokens", "share", "lower", lambda run: run.wasted_share)
SNAPSHOT = Metric("snapshot_s", "weights: snapshot", "s", "lower", _weights(lambda one: one.snapshot_s))
PUSH = Metric("push_s", "weights: push", "s", "lower", _weights(lambda one: one.push_s))
PULL = Metric("pull_s", "weights: pull", "s", "lower", _weights(lambda one: one.pull_s))
RELOAD = Metric("reload_s", "weights: reload", "s", "lower", _weights(lambda one: one.reload_s))
PAUSE = Metric("pause_s", "weights: pause", "s", "lower", _weights(lambda one: one.pause_s))
EXPOSED = Metric("exposed_share", "weights: exposed share", "share", "lower", exposed_share)
WEIGHTS_RATE = Metric("weights_bytes_per_s", "weights: bytes/s", "bytes/s", "higher", weights_per_s)
CALL_P50 = Metric("call_p50_s", "call p50", "s", "lower", _control(lambda one: one.call_p50_s))
CALL_P99 = Metric("call_p99_s", "call p99", "s", "lower", _control(lambda one: one.call_p99_s))
MESSAGES = Metric("messages_per_update", "messages per update", "", "lower",
                  _control(lambda one: one.messages_per_update))  # fmt: skip
MESSAGE_BYTES = Metric("bytes_per_update", "bytes per update", "bytes", "lower",
                       _control(lambda one: one.bytes_per_update))  # fmt: skip
OVERHEAD = Metric("overhead_share", "control-plane overhead", "share", "lower", overhead_share)
OPEN = Metric("open_s", "start-up: stack open", "s", "lower", _start_up(lambda one: one.open_s))
FIRST_TOKEN = Metric("first_token_s", "start-up: first token", "s", "lower", _start_up(lambda one: one.first_token_s))
FIRST_UPDATE = Metric("first_update_s", "start-up: first update", "s", "lower",
                      _start_up(lambda one: one.first_update_s))  # fmt: skip
FRESH_K3 = Metric("fresh_k3_kl", "k3-KL of fresh samples", "nats", "neither",
                  lambda run: run.fresh.k3_kl if run.fresh else None)  # fmt: skip
FRESH_DIFFERENCE = Metric("fresh_max_difference", "max difference of fresh samples", "nats", "neither",
                          lambda run: run.fresh.max_difference if run.fresh else None)  # fmt: skip
ROLES: tuple[Role, ...] = ("loop", "trainer", "generator")
MEMORY = tuple(Metric(f"peak_memory_{role}", f"peak memory of {role}", "bytes", "lower", peak_memory(role))
               for role in ROLES)  # fmt: skip
CPU = tuple(Metric(f"cpu_s_per_update_{role}", f"CPU time of {role} per update", "s", "lower", cpu_s(role))
            for role in ROLES)  # fmt: skip

METRICS: tuple[Metric, ...] = (
    UPDATE_P50, UPDATE_P95, SAMPLES, TRAINED, GENERATED, EFFICIENCY, TRAINER_IDLE, GENERATOR_IDLE, OVERLAP,
    STALENESS_MEAN, STALENESS_P95, STALENESS_MAX, VERSIONS, WASTED, SNAPSHOT, PUSH, PULL, RELOAD, PAUSE, EXPOSED,
    WEIGHTS_RATE, CALL_P50, CALL_P99, MESSAGES, MESSAGE_BYTES, OVERHEAD, OPEN, FIRST_TOKEN, FIRST_UPDATE, FRESH_K3,
    FRESH_DIFFERENCE, *MEMORY, *CPU,
)  # fmt: skip
