"""Forks one process per step attempt, in milliseconds, from a small process that has the step code loaded.

    worker --(socket: request file + one end of a pipe)--> spawner --> idle child, a session of its own: Host.run

One child is forked ahead of its request. It holds its end of the pipe until its result is written, so the worker sees
its end as an end of file. Steps outlive the worker. The spawner, their parent, stays until the last one has ended: when
one is killed, what it had started becomes the spawner's child and is killed too.
"""

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


class _Spawner:
    """Serves one worker."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._hosts: set[int] = set()
        self._woken, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._idle: _Idle | None = None

    def serve(self) -> None:
        """Give each request to a child until the worker is gone and every attempt has ended."""
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        poller.register(self._woken, select.POLLIN)
        self._idle = self._fork()
        while self._idle is not None or self._hosts:
            ready = {descriptor for descriptor, _ in poller.poll()}
            if self._woken in ready:
                os.read(self._woken, 4096)
                self._reap()
            if self._idle is not None and self._control.fileno() in ready and not self._pass_on():
                poller.unregister(self._control)
                self._idle.channel.close()
                self._idle = None

    def _pass_on(self) -> bool:
        """Give one request to the idle child and fork the next; False when the worker is gone."""
        try:
            message, descriptors, _, _ = socket.recv_fds(self._control, _LONGEST_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            return False
        if not message:
            return False
        for _ in range(_MOST_TRIES):
            idle, self._idle = self._idle or self._fork(), None
            with idle.channel:
                try:
                    socket.send_fds(idle.channel, [message], descriptors)
                except OSError:
                    # Somebody has killed the child.
                    continue
                self._hosts.add(idle.pid)
                break
        for descriptor in descriptors:
            os.close(descriptor)
        self._idle = self._fork()
        return True

    def _fork(self) -> "_Idle":
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            pid = os.fork()
            if pid == 0:
                for descriptor in (self._control.detach(), ours.detach(), self._woken, self._waker):
                    os.close(descriptor)
                _be_child(theirs)
        return _Idle(pid, ours)

    def _reap(self) -> None:
        """Collect the attempts that have ended; kill what one that was killed has left behind."""
        for pid, status in reap_exited():
            if pid in self._hosts and status != 0:
                self._kill_orphans()
            self._hosts.discard(pid)

    def _kill_orphans(self) -> None:
        own = {*self._hosts, self._idle.pid if self._idle else 0}
        for child in psutil.Process().children():
            if child.pid not in own:
                end([child, *descendants(child.pid)], 0)


class _Idle(NamedTuple):
    """A child that waits for its request."""

    pid: int
    channel: socket.socket


def _be_child(channel: socket.socket) -> None:
    """Body of a child: wait for a request, run it, exit."""
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        warm_up()
        message, descriptors, _, _ = socket.recv_fds(channel, _LONGEST_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
        channel.close()
        if message:
            run_isolated(Path(os.fsdecode(message)))
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
