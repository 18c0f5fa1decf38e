"""StepActor: runs step attempts, one at a time, in a thread of its own process on a Ray node.

`start` is idempotent by key, `poll` answers while the step runs, and an ended attempt is kept until it is released: the
folder of an attempt that nobody has released stays on the node even when the actor is gone.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import threading
import time
import traceback
from pathlib import Path

from cluster import orphans
from cluster.attempt_folder import Cursor, Poll, attempts_root, note_copy, read_beyond, sweep, within
from cluster.moved import to_copy
from cluster.plan_copies import PlanCopies
from cluster.plan_modules import PlanModules
from cluster.shape import ResourceShape
from cluster.witness import Witness, is_here
from container.view import activate_view
from container.worker import FOLDER_VARIABLE, REFUSED_VARIABLE, UP
from steps import Frozen, StepRequest
from steps._files import RESULT
from steps._host import Host
from steps._kept import Kept

_TICK_S = 0.05
"""How often a waiting poll looks for new log bytes and progress."""


class ActorState(Frozen):
    """What a step actor tells the pool."""

    node: str
    """Host name."""
    node_id: str
    """Ray's id of the node."""
    folder: str
    """Where the actor keeps its attempts, on that node."""
    address: str
    """Address of the node for the other nodes."""
    pid: int
    refused: str = ""
    """Why it is not in its image, or not as the image wants it; such an actor runs nothing."""
    key: str = ""
    """Key of the attempt that runs, or has ended and is not released."""
    running: bool = False
    contact_age_s: float = 0.0
    """Seconds since somebody asked about that attempt."""


class _Attempt:
    """One attempt in this actor."""

    def __init__(self, request: StepRequest, folder: Path, gpus: list[str], kept: Kept | None) -> None:
        self.request = request
        self.folder = folder
        self.host = Host(request, folder, gpus=gpus, isolated=False, kept=kept)
        self.thread_left = asyncio.Event()
        self.contact_at = time.monotonic()

    @property
    def ended(self) -> bool:
        """True once the result is written; a stuck step is abandoned with its thread still inside."""
        return self.thread_left.is_set() or (self.host.stuck and (self.folder / RESULT).exists())


class StepActor:
    """Made a detached Ray actor by the pool."""

    def __init__(self, name: str, shape: ResourceShape) -> None:
        self._name = name
        self._shape = shape
        if own := os.environ.get(FOLDER_VARIABLE):
            # In a container of its own, whose end ends all in it.
            self._folder = Path(own)
            (self._folder / UP).touch()
        else:
            self._folder = attempts_root() / name
            self._folder.mkdir(mode=0o700, exist_ok=REFUSED_VARIABLE in os.environ)
            sweep(self._folder.parent)
            orphans.start(self._folder)
        # Here, and not in the containers' worker: a node that is the image has no such worker.
        self._refused = os.environ.get(REFUSED_VARIABLE) or activate_view(os.environ)
        os.register_at_fork(after_in_child=_end_on_sigterm)
        self._modules = PlanModules()
        self._copies = PlanCopies(self._folder.parent)
        self._kept = Kept(orphans.kept_key(name)) if shape.actor else None
        self._attempt: _Attempt | None = None
        self._known_keys: set[str] = set()
        self._node = socket.gethostname()

    async def start(
        self,
        request: StepRequest,
        cursor: Cursor,
        wait_s: float,
        witness: Witness | None = None,
        content_hash: str = "",
    ) -> Poll:
        """Start the attempt, or attach to it when it was started before; then as `poll`.

        `witness` is of the plan's folder; where that is not here, the copy with the `content_hash` takes its place.
        """
        if request.key not in self._known_keys:
            if self._attempt is not None and not self._attempt.ended:
                return Poll(busy=True)
            folder = within(self._folder, request.key)
            if witness is None or is_here(witness, Path(request.plan_dir)):
                request = request.model_copy(update={"cached_artifacts": ()})
            elif copy_dir := self._copies.hold(content_hash) if content_hash else None:
                note_copy(folder, request.plan_dir, copy_dir)
                request = to_copy(request, copy_dir)
            else:
                return Poll(away=True)
            self._known_keys.add(request.key)
            gpus = _gpus()
            env = self._shape.thread_environment | request.env
            request = request.model_copy(update={"env": env})
            self._attempt = _Attempt(request, folder, gpus, self._kept)
            arguments = self._attempt, asyncio.get_running_loop()
            threading.Thread(target=self._work, args=arguments, name="step", daemon=True).start()
        return await self.poll(request.key, cursor, wait_s)

    async def poll(self, key: str, cursor: Cursor, wait_s: float) -> Poll:
        """What is new beyond `cursor`; waits at most `wait_s` for something new."""
        attempt = self._attempt
        if attempt is None or attempt.request.key != key:
            return Poll(known=False)
        deadline = time.monotonic() + wait_s
        while True:
            attempt.contact_at = time.monotonic()
            found = read_beyond(attempt.folder, cursor, ended=attempt.ended)
            is_new = found.result or any(found.chunks) or found.progress != cursor.progress
            if is_new or time.monotonic() >= deadline:
                where = {"node": self._node, "pid": os.getpid(), "stuck": attempt.host.stuck}
                return found.model_copy(update=where)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(attempt.thread_left.wait(), _TICK_S)
                if attempt.ended and not (attempt.folder / RESULT).exists():
                    return Poll(known=False)

    async def holds(self, content_hash: str) -> bool:
        """True when this node has the copy of a plan's folder with this content; the actor keeps it then."""
        return self._copies.hold(content_hash) is not None

    async def receive(self, offset: int, data: bytes) -> None:
        """Take the next piece of a plan's folder."""
        await asyncio.to_thread(self._copies.receive, offset, data)

    async def unpack(self, content_hash: str) -> None:
        """Make the copy of a plan's folder from what was received."""
        await asyncio.to_thread(self._copies.unpack, content_hash)

    async def cancel(self, key: str) -> bool:
        """Ask the attempt to end within its grace period; False when it is not here."""
        if self._attempt is None or self._attempt.request.key != key:
            return False
        self._attempt.host.cancel()
        return True

    async def release(self, key: str) -> None:
        """Forget an ended attempt and remove its folder."""
        attempt = self._attempt
        if attempt is not None and attempt.request.key == key and attempt.ended:
            self._attempt = None
        if attempt is None or attempt.request.key != key or attempt.ended:
            await asyncio.to_thread(shutil.rmtree, within(self._folder, key), ignore_errors=True)

    async def free_port(self) -> int:
        """A port of this node that nobody listens on now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            port: int = probe.getsockname()[1]
            return port

    async def shape(self) -> ResourceShape:
        """What this actor was made for."""
        return self._shape

    async def state(self) -> ActorState:
        """Where this actor is and what it holds."""
        import ray

        attempt = self._attempt
        return ActorState(
            node=self._node,
            node_id=ray.get_runtime_context().get_node_id(),
            folder=str(self._folder),
            address=ray.util.get_node_ip_address(),
            pid=os.getpid(),
            refused=self._refused,
            key=attempt.request.key if attempt else "",
            running=attempt is not None and not attempt.ended,
            contact_age_s=time.monotonic() - attempt.contact_at if attempt else 0.0,
        )

    def _work(self, attempt: _Attempt, loop: asyncio.AbstractEventLoop) -> None:
        try:
            orphans.announce(self._folder, attempt.request)
            self._modules.prepare(Path(attempt.request.plan_dir))
            attempt.host.run()
            self._modules.remember()
        except BaseException:
            # An interrupt meant for the step may arrive a moment late; the result is written then.
            traceback.print_exc()
        finally:
            loop.call_soon_threadsafe(attempt.thread_left.set)


def _end_on_sigterm() -> None:
    """In a child the step forks: Ray's handler would unwind the copy of our stack there and write a result."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _gpus() -> list[str]:
    import ray

    return [str(gpu) for gpu in ray.get_gpu_ids()]
