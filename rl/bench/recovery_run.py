"""One run in which a role is killed: `python -m rl.bench.recovery_run REQUEST.json RESULT.json`.

    train -> update n is live -> SIGKILL -> lost -> replaced -> (updates again) -> an update that is new -> the last one

Whether anything was lost or doubled is read from the checkpoint of the finished run.
"""

import asyncio
import os
import signal
import time
from collections import Counter
from pathlib import Path

from rl.bench.child import answer
from rl.bench.recovery import RecoveryRequest
from rl.bench.results import Recovery
from rl.checkpoint import read_state
from rl.ledger import RunState
from rl.metrics import Notice, RunEvent, UpdateRecord
from rl.train import train


class Observer:
    """Hears of every event of the run, kills once, and notes what follows; moments are of the monotonic clock."""

    def __init__(self, request: RecoveryRequest) -> None:
        self._request = request
        self._part = "trainer" if request.killed == "trainer" else "generator 0"
        self._newest = -1
        self.killed_s: float | None = None
        self.back_s: float | None = None
        self.next_update_s: float | None = None
        self.repeated = 0

    def __call__(self, event: RunEvent) -> None:
        """Called by the run, right when it happens."""
        now_s = time.perf_counter()
        if isinstance(event, UpdateRecord):
            if self.killed_s is not None and self.next_update_s is None:
                if event.train.update > self._newest:
                    self.next_update_s = now_s
                else:
                    self.repeated += 1
            self._newest = max(self._newest, event.train.update)
            if self.killed_s is None and event.train.update >= self._request.kill_after:
                pid = process_of(self._part, self._request)
                self.killed_s = time.perf_counter()
                os.kill(pid, signal.SIGKILL)
        elif isinstance(event, Notice) and event.event == f"{self._request.killed}_replaced":
            self.back_s = self.back_s or now_s


def process_of(part: str, request: RecoveryRequest) -> int:
    """The process that hosts a part now. Raises LookupError."""
    # The processes of a run register for its watchdog: part, host, pid, beginning.
    lines = [path.read_text().splitlines() for path in Path(request.folder, "stacks").glob("*.process")]
    found = [int(pid) for name, _, pid, _ in lines if name == part and int(pid) != os.getpid()]
    if len(found) != 1:
        raise LookupError(f"`{part}` is hosted by processes {found}, wanted one")
    return found[0]


def fates(state: RunState) -> tuple[int, int]:
    """Of all groups that were ever asked for: those that vanished, and the times that one was trained on again."""
    trained = [index for update in state.ledger.trained for index in update]
    kept = [*(int(group.id) for group in state.finished), *state.unfinished]
    known = {*trained, *kept, *state.ledger.filtered, *state.ledger.dropped}
    lost = len(set(range(state.cursor)) - known)
    times = Counter([*trained, *(index for index in kept if index in set(trained))])
    return lost, sum(count - 1 for count in times.values())


async def run(request: RecoveryRequest) -> Recovery:
    """The run to its end. Raises what `rl.train.train` raises, and ValueError where nobody came back."""
    observer = Observer(request)
    result = await train(request.config, request.folder, report=observer)
    killed_s, back_s, next_update_s = observer.killed_s, observer.back_s, observer.next_update_s
    if killed_s is None or back_s is None or next_update_s is None:
        raise ValueError(f"the run ended after {result.updates} updates, and the {request.killed} was never replaced")
    lost, doubled = fates(read_state(Path(result.checkpoint)))
    return Recovery(
        stack=request.config.stack,
        killed=request.killed,
        seed=request.config.seed,
        next_update_s=next_update_s - killed_s,
        back_s=back_s - killed_s,
        samples_lost=lost,
        samples_doubled=doubled,
        repeated_updates=observer.repeated,
    )


def main() -> None:
    """The child."""
    answer(RecoveryRequest, lambda request: asyncio.run(run(request)))


if __name__ == "__main__":
    main()
