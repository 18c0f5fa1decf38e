"""What a run says while it goes on: one JSON line per update, the same numbers for TensorBoard, and events.

    loop --UpdateRecord--> RunLog --> <folder>/metrics.jsonl, <folder>/tensorboard/, report(event)

Lines are written when the weights of their update are live. A resumed run cuts off the lines of the updates that it
does again, so that every update has one line. The files are what the run is judged by, so failing to write them ends
it.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rl.busy import Shares
from rl.evaluation import EvaluationReport
from rl.ledger import Tokens
from rl.types import Frozen, TrainMetrics

METRICS, EVALUATIONS, TENSORBOARD = "metrics.jsonl", "evaluations.jsonl", "tensorboard"


class Phases(Frozen):
    """How long the phases of one update took, in seconds. Only the first four keep the trainer from its next update."""

    wait_s: float = 0.0
    """For groups."""
    update_s: float = 0.0
    publish_wait_s: float = 0.0
    """For the publication of the update before."""
    checkpoint_s: float = 0.0
    """Of the checkpoint before this update, 0 without one; the wait for its publication included."""
    snapshot_s: float = 0.0
    push_s: float = 0.0
    pull_s: float = 0.0
    """Of the slowest generator, as the next two."""
    reload_s: float = 0.0
    pause_s: float = 0.0
    live_s: float = 0.0
    """From the end of the update until every generator samples by its weights."""


class UpdateRecord(Frozen):
    """One update, complete: what was trained on, what it cost, and where the time went."""

    event: Literal["update"] = "update"
    at: float = 0.0
    """Seconds since 1970."""
    train: TrainMetrics
    phases: Phases
    shares: Shares
    """Since the line before."""
    samples_per_s: float
    trained_tokens_per_s: float
    generated_tokens_per_s: float
    weights_bytes: int
    parity: float
    """Largest difference of log-probabilities between trainer and any generator, in nats; not a number where both are
    emulated, as the numbers of `train` that only a model can say."""
    staleness: tuple[int, ...]
    """[groups] versions between the trainer's weights and the oldest that sampled the group."""
    versions_per_trajectory: float
    """Mean number of versions that sampled a trajectory."""
    num_waiting: int
    """Finished groups that were left when the update took its own."""
    num_filtered: int
    """Groups with equal rewards, since the run began; as the next three."""
    num_dropped: int
    num_sampled_again: int
    """Groups that were lost with a generator."""
    num_replaced: int
    """Generators that were lost."""
    tokens: Tokens


class EvaluationRecord(Frozen):
    """What the weights of one version can do on held-out prompts."""

    event: Literal["evaluation"] = "evaluation"
    at: float = 0.0
    version: int
    duration_s: float
    report: EvaluationReport


class Notice(Frozen):
    """Something that a person wants to know."""

    event: Literal["generator_lost", "generator_replaced", "trainer_lost", "trainer_replaced", "checkpoint", "stuck"]
    at: float = 0.0
    message: str


RunEvent = UpdateRecord | EvaluationRecord | Notice
Report = Callable[[RunEvent], None]


class RunLog:
    """The files of a run, open for writing."""

    def __init__(self, folder: Path, report: Report, *, update: int = 0, evaluated: int = -1) -> None:
        self._report = report
        self._metrics, self._evaluations = folder / METRICS, folder / EVALUATIONS
        self._board = _TensorBoard(folder / TENSORBOARD)
        self.rewind(update, evaluated)

    def rewind(self, update: int, evaluated: int) -> None:
        """Cut off what was said about updates from `update` on, and about versions after `evaluated`."""
        _cut(self._metrics, lambda line: line["train"]["update"] < update)
        _cut(self._evaluations, lambda line: line["version"] <= evaluated)
        self._board.restart(update)

    def __call__(self, event: RunEvent) -> None:
        """Write the event down, then report it."""
        event = event.model_copy(update={"at": time.time()})
        if isinstance(event, UpdateRecord):
            _append(self._metrics, event)
            self._board.add(event.train.update, _numbers("", event.model_dump(exclude={"at", "event"})))
        elif isinstance(event, EvaluationRecord):
            _append(self._evaluations, event)
            overall = event.report.overall.model_dump(exclude={"failure_modes", "accuracy_interval"})
            self._board.add(event.version, _numbers("evaluation/", overall))
        self._report(event)

    def close(self) -> None:
        """Everything is on its way to the disk."""
        self._board.close()


class _TensorBoard:
    """Event files, without torch."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(folder))

    def restart(self, step: int) -> None:
        """TensorBoard forgets what it was told about this step and later ones."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        session = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=step, session_log=session))

    def add(self, step: int, numbers: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=number) for tag, number in numbers.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._writer.close()


def _numbers(prefix: str, tree: dict[str, Any]) -> dict[str, float]:
    """`{"phases": {"wait_s": 1}}` -> `{"phases/wait_s": 1}`; what is no number is left out."""
    found: dict[str, float] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= _numbers(f"{prefix}{name}/", value)
        elif isinstance(value, int | float):
            found[f"{prefix}{name}"] = float(value)
    return found


def _append(path: Path, line: Frozen) -> None:
    with path.open("a") as file:
        file.write(line.model_dump_json() + "\n")


def _cut(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Keep the lines that are whole and wanted, by a file beside and a rename."""
    if not path.exists():
        return
    kept = [
        line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n") and keep(json.loads(line))
    ]
    beside = path.with_name(f".{path.name}")
    beside.write_text("".join(kept))
    beside.replace(path)
