"""Gives every step attempt a process, in milliseconds, from a small process that has the step code loaded.

    worker --(socket: request file + one end of a pipe)--> spawner --> child, a session of its own: Host.run
                                                              ^----------- "idle" ----------'

A child is forked ahead of its request. It closes its end of the pipe when its result is written, so the worker sees the
end of the attempt as an end of file. A child that `left_no_trace` then waits for another request, which costs less than
half of a new child. Any other one exits, so a step of a type that is not reusable is the last one its process runs. All
exit when the worker is gone: whoever finds a running attempt later sees its end as the end of its process.

Steps outlive the worker. The spawner, their parent, stays until the last one has ended: when one is killed, what it had
started becomes the spawner's child and is killed too.
"""

import contextlib
import gc
import os
import select
import signal
import socket
import traceback
from pathlib import Path
from typing import NamedTuple

import psutil

from steps._host import run_isolated, warm_up
from steps._logs import open_standard_descriptors
from steps._process import become_subreaper, descendants, end, reap_exited

_LONGEST_MESSAGE = 65_536
_MOST_TRIES = 3
_MOST_IDLE = 8
_MOST_ATTEMPTS = 1000
"""Of one child, so that nothing can pile up in it for ever."""
_MOST_SWEEPS = 20
_QUIET_MS = 10_000
"""After so long without an event, one idle child is enough."""
_IDLE = b"idle"


class _Spawner:
    """Serves one worker."""

    def __init__(self, control: socket.socket) -> None:
        self._control: socket.socket | None = control
        self._woken, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poller = select.poll()
        self._children: dict[int, _Child] = {}
        """Every child that was not collected yet, by pid."""
        self._idle: list[_Child] = []
        """Those that wait for a request; the last one has run most recently."""
        self._busy: dict[int, _Child] = {}
        """Those that may become idle again, by the descriptor of their channel."""
        self._passed: list[int] = []
        """Descriptors of the request that is passed on."""

    def serve(self) -> None:
        """Give each request to a child until the worker is gone and every attempt has ended."""
        assert self._control is not None
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        requests = self._control.fileno()
        self._poller.register(requests, select.POLLIN)
        self._poller.register(self._woken, select.POLLIN)
        self._fork()
        while self._control is not None or self._children:
            ready = {descriptor for descriptor, _ in self._poller.poll(_QUIET_MS if len(self._idle) > 1 else None)}
            if not ready:
                self._let_go(self._idle[:-1])
            for descriptor in ready & self._busy.keys():
                self._hear(self._busy[descriptor])
            if self._woken in ready:
                os.read(self._woken, 4096)
                self._reap()
            if self._control is not None and requests in ready and not self._pass_on(self._control):
                self._poller.unregister(requests)
                self._control = None
                self._let_go([*self._idle, *self._busy.values()])

    def _pass_on(self, control: socket.socket) -> bool:
        """Give one request to an idle child, and have one more ready; False when the worker is gone."""
        try:
            message, descriptors, _, _ = socket.recv_fds(control, _LONGEST_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            return False
        if not message:
            return False
        self._passed = descriptors
        for _ in range(_MOST_TRIES):
            if not self._idle:
                self._fork()
            child = self._idle.pop()
            try:
                socket.send_fds(child.channel, [message], descriptors)
            except OSError:
                # Somebody has killed the child.
                child.channel.close()
                continue
            self._busy[child.channel.fileno()] = child
            self._poller.register(child.channel, select.POLLIN)
            break
        for descriptor in descriptors:
            os.close(descriptor)
        self._passed = []
        if not self._idle:
            self._fork()
        return True

    def _hear(self, child: "_Child") -> None:
        """The child has ended its attempt and is idle, or is about to exit."""
        del self._busy[child.channel.fileno()]
        self._poller.unregister(child.channel)
        with contextlib.suppress(OSError):
            if child.channel.recv(len(_IDLE)) == _IDLE and len(self._idle) < _MOST_IDLE:
                self._idle.append(child)
                return
        child.channel.close()

    def _let_go(self, children: "list[_Child]") -> None:
        """Have children exit when they have nothing to do."""
        for child in children:
            if self._busy.pop(child.channel.fileno(), None) is not None:
                self._poller.unregister(child.channel)
            child.channel.close()
        self._idle = [child for child in self._idle if child not in children]

    def _fork(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            pid = os.fork()
            if pid == 0:
                # An end of another child's channel or pipe, kept open here, would hide its end.
                channels = [child.channel.fileno() for child in self._children.values()]
                control = [self._control.fileno()] if self._control is not None else []
                for descriptor in (*control, *channels, *self._passed, ours.fileno(), self._woken, self._waker):
                    if descriptor >= 0:
                        os.close(descriptor)
                _be_child(theirs)
        child = _Child(pid, ours)
        self._children[pid] = child
        self._idle.append(child)

    def _reap(self) -> None:
        """Collect the children that have ended; kill what one that was killed has left behind."""
        for pid, status in reap_exited():
            child = self._children.pop(pid, None)
            if child is None:
                continue
            if child.channel.fileno() >= 0:
                self._let_go([child])
            if status != 0:
                self._kill_orphans()

    def _kill_orphans(self) -> None:
        # Until there is none: the worker kills too, and the child of a parent that has just ended is ours only now.
        for _ in range(_MOST_SWEEPS):
            orphans = [child for child in psutil.Process().children() if child.pid not in self._children]
            if not orphans:
                return
            end([process for child in orphans for process in (child, *descendants(child.pid))], 0)


class _Child(NamedTuple):
    """A forked process, and our end of its channel; that is closed when it is to run nothing more."""

    pid: int
    channel: socket.socket


def _be_child(channel: socket.socket) -> None:
    """Body of a child: wait for a request, run it, and again while that leaves no trace; exit."""
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        warm_up()
        for _ in range(_MOST_ATTEMPTS):
            message, descriptors, _, _ = socket.recv_fds(channel, _LONGEST_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
            if not message:
                break
            if not run_isolated(Path(os.fsdecode(message))):
                break
            # The handlers of the attempt know its `Host`.
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            try:
                channel.send(_IDLE)
            except OSError:
                # The worker or the spawner is gone.
                break
            # Last, so that a request for the step that follows meets an idle child.
            for descriptor in descriptors:
                os.close(descriptor)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    finally:
        os._exit(0)


def main() -> None:
    """Entry point: the control socket is fd 0."""
    control = socket.socket(fileno=os.dup(0))
    os.close(0)
    open_standard_descriptors()
    os.chdir("/")
    become_subreaper()
    warm_up()
    gc.collect()
    gc.freeze()
    _Spawner(control).serve()


if __name__ == "__main__":
    main()
