"""Removes containers, and their files, whose owner is gone: the process that started them and should end with them.

owner starts a container labelled `orchestrate.owner=<owner()>`, its files in `private_folder(name)`
watch(pids, name)   a small process beside the owner: removes both when one of the pids ends
reap()              removes all that no living owner claims; for whoever comes by, when even the watch was killed
"""

import contextlib
import os
import select
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from container.engine_socket import NOT_FOUND, EngineError, EngineSocket

OWNER_LABEL = "orchestrate.owner"
_OWNER_FILE = "owner"
_PREFIX = "orchestrate-private"
_TRIES = 30
_PAUSE_S = 2.0
_RUNNER = "import sys; sys.path[:1] = [sys.argv.pop(1)]; from container.reaper import main; main()"


def owner(pid: int | None = None) -> str:
    """Value of the label: names a process for ever, by default this one."""
    pid = pid or os.getpid()
    return "_".join((_boot(), _pid_space(), str(pid), str(_start_ticks(pid))))


def is_gone(owner: str) -> bool:
    """True when the process is known to be gone; of one in another pid namespace or on another machine nothing is."""
    if owner.count("_") != 3:
        return False
    boot, space, pid, ticks = owner.split("_")
    if (boot, space) != (_boot(), _pid_space()):
        return False
    now = _start_ticks(int(pid))
    return str(now) != ticks and not (now is None and _is_hidden(int(pid)))


def private_folder(name: str) -> Path:
    """Where the files of container `name` lie that others must not read; in memory where the machine can."""
    return _private_root() / f"{_PREFIX}-{os.getuid()}-{name}"


def make_private_folder(name: str) -> Path:
    """Make it, owned by this process."""
    folder = private_folder(name)
    folder.mkdir(mode=0o700)
    (folder / _OWNER_FILE).write_text(owner())
    return folder


def reap(env: Mapping[str, str]) -> list[str]:
    """Remove what no living owner claims; the names of the containers. Nothing happens where no engine answers."""
    removed = []
    with contextlib.suppress(EngineError):
        engine = EngineSocket(env)
        for each in engine.list_with_label(OWNER_LABEL):
            claim, name = each["Labels"][OWNER_LABEL], each["Names"][0].removeprefix("/")
            if is_gone(claim) or (each["State"] in ("exited", "dead") and _is_of_another_boot(claim)):
                engine.remove(name)
                removed.append(name)
    for folder in _private_root().glob(f"{_PREFIX}-{os.getuid()}-*"):
        with contextlib.suppress(ValueError):
            if is_gone(_claim(folder)):
                shutil.rmtree(folder, ignore_errors=True)
    return removed


def start_watch(pids: Sequence[int], name: str, env: Mapping[str, str], grace_s: int = 0) -> None:
    """Start the process that removes container `name` and its files, if one of `pids` owns it, when one has ended.

    A container that still runs is asked to end, and killed `grace_s` later.
    Nobody's child, in a session of its own and with nothing of the caller's environment, so that what ends the caller
    and all it has started spares it.
    """
    root = str(Path(__file__).parent.parent)
    argv = [sys.executable, "-SEc", _RUNNER, root, name, str(grace_s), *(f"{pid}:{_start_ticks(pid)}" for pid in pids)]
    shell = ["/bin/sh", "-c", '"$@" &', "sh", *argv]
    own = {key: env[key] for key in ("DOCKER_HOST", "PATH", "XDG_RUNTIME_DIR", "TMPDIR") if key in env}
    null = os.open(os.devnull, os.O_RDWR)
    try:
        actions = [(os.POSIX_SPAWN_DUP2, null, descriptor) for descriptor in range(3)]
        os.waitpid(os.posix_spawn(shell[0], shell, own, file_actions=actions, setsid=True), 0)
    finally:
        os.close(null)


def main() -> None:
    """The process of `start_watch`."""
    os.chdir("/")
    name, grace_s, *watched = sys.argv[1:]
    reap(os.environ)
    poller = select.poll()
    for text in watched:
        pid, _, ticks = text.partition(":")
        try:
            descriptor = os.pidfd_open(int(pid))
        except ProcessLookupError:
            break
        if str(_start_ticks(int(pid))) != ticks:
            break
        poller.register(descriptor, select.POLLIN)
    else:
        poller.poll()
    owners = ["_".join((_boot(), _pid_space(), *text.split(":"))) for text in watched]
    remove(name, os.environ, owners, int(grace_s))
    # A container whose making was under way when the owner died appears a moment later.
    time.sleep(_PAUSE_S)
    reap(os.environ)


def remove(
    name: str, env: Mapping[str, str], owners: Collection[str] = (), grace_s: int = 0, tries: int = _TRIES
) -> None:
    """Remove a container and its files; with `owners`, only what one of them claims: others may use the same name.

    An engine that does not answer is asked again, by default for a minute.
    """
    if not owners or _claim(private_folder(name)) in owners:
        shutil.rmtree(private_folder(name), ignore_errors=True)
    for left in reversed(range(tries)):
        try:
            engine = EngineSocket(env)
            if owners and (engine.inspect(name)["Config"]["Labels"] or {}).get(OWNER_LABEL) not in owners:
                return
            if grace_s:
                engine.stop(name, grace_s)
            engine.remove(name)
        except EngineError as error:
            if error.status == NOT_FOUND:
                return
            time.sleep(_PAUSE_S if left else 0)
        else:
            return


def _claim(folder: Path) -> str:
    try:
        return (folder / _OWNER_FILE).read_text()
    except OSError:
        return ""


def _private_root() -> Path:
    folders = [os.environ.get("XDG_RUNTIME_DIR", ""), "/dev/shm", tempfile.gettempdir()]
    return Path(next(each for each in folders if each and os.access(each, os.W_OK | os.X_OK)))


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _is_of_another_boot(owner: str) -> bool:
    return owner.partition("_")[0] != _boot()


def _pid_space() -> str:
    """The pid namespace in which our pids have their meaning."""
    return str(Path("/proc/self/ns/pid").readlink()).partition("[")[2].rstrip("]")


def _is_hidden(pid: int) -> bool:
    """Whether a process runs that `/proc` does not show to this user (mount option `hidepid`)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def _start_ticks(pid: int) -> int | None:
    """Clock ticks from boot to the start of the process; None when it does not run (a zombie does not)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
