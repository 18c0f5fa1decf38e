"""Fixtures shared by the test files: real parts, started on loopback and stopped at the end."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import settings

from rl.config import EngineConfig, EngineName, RunConfig
from rl.rollout import RolloutSettings
from steps import StepCancelled

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


class RecordingContext:
    """A step's context that keeps what the step says; processes are real."""

    def __init__(self, folder: Path, env: Mapping[str, str], secrets: Mapping[str, str], key: str) -> None:
        self.key = key
        self.attempt = int(key.rpartition("/")[2])
        self.plan_dir = self.working_dir = folder
        self.attempt_dir = folder / f"attempt-{self.attempt}"
        self.attempt_dir.mkdir(exist_ok=True)
        self.env = {"PATH": "/usr/bin:/bin", "HOME": str(folder), **env}
        self.declared_env = dict(env)
        self.secrets = dict(secrets)
        self.gpus: tuple[str, ...] = ()
        self.grace_s = 1.0
        self.lines: list[tuple[str, str]] = []
        self.progress: list[Any] = []
        self.logged = threading.Condition()
        self._cancelled = threading.Event()
        self._callbacks: list[Callable[[], None]] = []

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def check_cancelled(self) -> None:
        if self.cancelled:
            raise StepCancelled

    def on_cancel(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    def log(self, message: str, stream: str = "stdout") -> None:
        with self.logged:
            self.lines.append((stream, message))
            self.logged.notify_all()

    def heartbeat(self, progress: str | Mapping[str, Any]) -> None:
        self.progress.append(progress)

    def run_process(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        working_dir: Path | None = None,
        stdin: bytes | None = None,
    ) -> int:
        process = subprocess.Popen(
            argv,
            cwd=working_dir or self.working_dir,
            env={**self.env, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
        )
        self.on_cancel(process.kill)
        output, errors = process.communicate(stdin)
        for stream, text in (("stdout", output), ("stderr", errors)):
            for line in text.decode().splitlines():
                self.log(line, stream)
        self.check_cancelled()
        return process.returncode

    def cancel(self) -> None:
        """End the step as the host does: the flag, then the callbacks."""
        self._cancelled.set()
        for callback in self._callbacks:
            callback()

    def wait_for_line(self, text: str, timeout_s: float = 60) -> None:
        """Wait until a logged line contains `text`."""
        with self.logged:
            found = self.logged.wait_for(lambda: any(text in line for _, line in self.lines), timeout_s)
        assert found, f"`{text}` not logged; got {self.lines}"

    def text(self, stream: str = "stdout") -> str:
        """What was logged to one stream."""
        return "\n".join(line for of, line in self.lines if of == stream)


@pytest.fixture
def step_context(tmp_path: Path) -> Callable[..., RecordingContext]:
    """Makes contexts for steps that run in the test's own process."""

    def make(
        env: Mapping[str, str] | None = None, secrets: Mapping[str, str] | None = None, key: str = "flow/run/step/1"
    ) -> RecordingContext:
        return RecordingContext(tmp_path, env or {}, secrets or {}, key)

    return make


@pytest.fixture
def http_site() -> Iterator[Callable[..., str]]:
    """Serves on loopback: give it a function `answer(handler)`, get the address."""
    servers: list[ThreadingHTTPServer] = []

    def serve(answer: Callable[[BaseHTTPRequestHandler], None]) -> str:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                answer(self)

            def do_HEAD(self) -> None:
                answer(self)

            def do_POST(self) -> None:
                answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def run_step(tmp_path: Path) -> Callable[..., Any]:
    """Runs one step in a process of its own, through the real host; returns its `StepResult`."""
    from steps import StepRequest, StepResult
    from steps._files import REQUEST, attempt_dir

    def run(
        type: str,
        params: dict[str, Any],
        *,
        env: dict[str, str] | None = None,
        secrets: dict[str, str] | None = None,
        timeout_s: float = 120,
        node_env: dict[str, str] | None = None,
    ) -> StepResult:
        request = StepRequest(
            workflow_id="flow",
            run_id="run",
            step_id=type,
            step_name=type,
            attempt=1,
            type=type,
            params=params,
            env=env or {},
            secrets=secrets or {},
            plan_dir=str(tmp_path),
            working_dir=str(tmp_path),
            log_dir=str(tmp_path / "logs"),
            timeout_s=timeout_s,
            grace_s=2,
        )
        folder = attempt_dir(request)
        folder.mkdir(parents=True)
        (folder / REQUEST).write_text(request.model_dump_json())
        done = subprocess.run(
            [sys.executable, "-P", "-m", "steps", str(folder / REQUEST)],
            env={**os.environ, **(node_env or {})},
            capture_output=True,
            timeout=timeout_s + 30,
            check=False,
        )
        return StepResult.model_validate_json(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[Any]:
    """A client of the Docker Engine; tests that need one are skipped where none answers."""
    from container.engine import EngineUnreachable, connect

    try:
        client = connect(os.environ)
    except EngineUnreachable as error:
        pytest.skip(str(error).partition("\n")[0])
    yield client
    client.close()


@pytest.fixture(scope="session")
def small_image(docker_engine: Any) -> str:
    """An image of a few megabytes with bash and the busybox tools, made from Debian's static programs."""
    programs = {"busybox": Path("/bin/busybox"), "bash": Path("/bin/bash-static")}
    if missing := [name for name, path in programs.items() if not path.exists()]:
        pytest.skip(f"Debian package `{missing[0]}-static` is not installed")
    digest = hashlib.sha256(b"1" + b"".join(path.read_bytes() for path in programs.values())).hexdigest()[:12]
    name = f"sygaldry-test/small:{digest}"
    if not docker_engine.images.list(name):
        tools = subprocess.run(["/bin/busybox", "--list"], capture_output=True, check=True, text=True).stdout.split()
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as archive:
            for program, path in programs.items():
                archive.add(path.resolve(), f"bin/{program}")
            for folder, mode in (("tmp", 0o1777), ("etc", 0o755), ("usr", 0o755)):
                entry = tarfile.TarInfo(folder)
                entry.type, entry.mode = tarfile.DIRTYPE, mode
                archive.addfile(entry)
            for link, goal in [("usr/bin", "../bin"), *((f"bin/{tool}", "busybox") for tool in tools)]:
                if link not in ("bin/bash", "bin/busybox"):
                    entry = tarfile.TarInfo(link)
                    entry.type, entry.linkname = tarfile.SYMTYPE, goal
                    archive.addfile(entry)
        repository, _, tag = name.partition(":")
        docker_engine.api.import_image_from_data(
            data.getvalue(), repository=repository, tag=tag, changes=["ENV PATH=/usr/bin:/bin"]
        )
    return name


@pytest.fixture(scope="session")
def base_image(docker_engine: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A minimal Debian with this machine's certificates; made once with mmdebstrap, then kept under its tag."""
    name = "sygaldry-test/debian:bookworm"
    if not docker_engine.images.list(name):
        if shutil.which("mmdebstrap") is None:
            pytest.skip("Debian package `mmdebstrap` is not installed")
        archive = tmp_path_factory.mktemp("base") / "base.tar"
        sources = sorted(str(path) for path in Path("/etc/apt/sources.list.d").glob("debian*.sources"))
        certificates = Path("/etc/ssl/certs/ca-certificates.crt")
        hook = ["--customize-hook=mkdir -p $1/etc/ssl/certs", f"--customize-hook=copy-in {certificates} /etc/ssl/certs"]
        subprocess.run(
            [
                "mmdebstrap",
                "--variant=minbase",
                "--quiet",
                *(hook if certificates.exists() else []),
                "bookworm",
                archive,
            ]
            + (sources or ["/etc/apt/sources.list"]),
            check=True,
            timeout=240,
        )
        repository, _, tag = name.partition(":")
        docker_engine.api.import_image_from_file(str(archive), repository=repository, tag=tag)
    return name


@pytest.fixture(scope="session")
def ray_image(docker_engine: Any, base_image: str) -> str:
    """Our own image, target `slim` without Spack, on the minimal Debian: a Ray node can start in it."""
    from container.image import ImageSpec, ensure

    spec = ImageSpec(name="sygaldry-test/ray:slim", base=base_image, target="slim", spack="")
    built = ensure(docker_engine, spec, print, timeout_s=280)
    # By content, so that test sessions of different checkouts do not meet.
    return f"sygaldry-test/ray:{built.content_hash[:16]}"


class Registry:
    """A registry on loopback that wants the login `pusher:let-me-in`."""

    login = "pusher:let-me-in"
    htpasswd = "pusher:$2y$04$ZMNp8c2V/NFpZHf7yXFin.HcMOuq3D4KyCJonSvpE8aDSAZszdgmq\n"

    def __init__(self, host: str) -> None:
        self.host = host
        """Host and port, the first part of an image's name."""


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """Debian's `docker-registry` with a password file."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("Debian package `docker-registry` is not installed")
    folder = tmp_path_factory.mktemp("registry")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        host = f"127.0.0.1:{taken.getsockname()[1]}"
    (folder / "htpasswd").write_text(Registry.htpasswd)
    settings = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "http": {"addr": host},
        "auth": {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}},
    }
    (folder / "config.yml").write_text(json.dumps(settings))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, "serve", folder / "config.yml"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(host.split(":"), timeout=1):  # type: ignore[arg-type]
                break
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
        yield Registry(host)
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="session")
def temporal_server(make_temporal_server: Callable[..., str]) -> str:
    """Address of a real Temporal dev server on loopback, tuned as the local services tune theirs."""
    return make_temporal_server()


@pytest.fixture(scope="session")
def make_temporal_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Starts Temporal dev servers; further dynamic settings are given as `name=value`."""
    import os
    import signal
    import socket
    import sys
    import time

    processes: list[subprocess.Popen[bytes]] = []

    def start(*settings: str) -> str:
        folder = tmp_path_factory.mktemp("temporal")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        argv = [str(Path(sys.executable).with_name("temporal")), "server", "start-dev", "--headless"]
        argv += ["--ip", "127.0.0.1", "--port", str(port), "--db-filename", str(folder / "temporal.db")]
        argv += ["--sqlite-pragma", "journal_mode=WAL", "--sqlite-pragma", "synchronous=NORMAL", "--log-level", "error"]
        for setting in ("history.transferProcessorMaxPollRPS=2000", *settings):
            argv += ["--dynamic-config-value", setting]
        log = folder / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(argv, stdout=output, stderr=output, stdin=subprocess.DEVNULL, process_group=0)
        processes.append(process)
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return f"127.0.0.1:{port}"
            except OSError:
                time.sleep(0.05)

    try:
        yield start
    finally:
        for process in processes:
            assert process.poll() is None, "the server has ended before the tests"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


class RayHead:
    """A Ray head started as its own daemon, with a token, 4 CPUs, 2 `slot`s and the label `zone=here`."""

    secret = "correct horse battery"
    """Value of the secret `STABLE` on the node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token_file = folder / "token"
        self.token_file.touch(mode=0o600)
        self.token_file.write_text(os.urandom(32).hex())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"

    def start(self, *options: str, **env: str) -> None:
        """Start it, with further options and variables; it listens at the same address every time."""
        argv = [str(Path(sys.executable).with_name("ray")), "start", "--head", f"--port={self.port}"]
        argv += ["--num-cpus=4", '--resources={"slot": 2}', "--labels=zone=here", "--include-dashboard=false"]
        argv += [f"--temp-dir={self.folder}", "--disable-usage-stats", "--object-store-memory=100000000"]
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file), "STABLE": self.secret}
        done = subprocess.run(
            [*argv, *options],
            env={**os.environ, **own, "TMPDIR": str(self.folder), **env},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def join(self, ip: str, hidden: Path, *options: str) -> None:
        """Start another node at a loopback address `ip`, with what is in the folder `hidden` for itself alone.

        There it keeps its temporary files too: a test sees them at `/proc/<pid of a process of it>/root/`.
        """
        argv = [str(Path(sys.executable).with_name("ray")), "start", f"--address={self.address}"]
        argv += [f"--node-ip-address={ip}", "--disable-usage-stats", "--object-store-memory=100000000", *options]
        script = 'mount -t tmpfs none "$0" && mkdir "$0/tmp" && TMPDIR="$0/tmp" exec "$@"'
        namespace = ["unshare", "--mount", *(() if os.getuid() == 0 else ("--map-root-user",))]
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file)}
        done = subprocess.run(
            [*namespace, "sh", "-c", script, str(hidden), *argv],
            env={**os.environ, **own}, cwd="/", capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def processes(self, word: str = "") -> list[Any]:
        """Living processes of this head, workers included; those with `word` in their title."""
        import psutil

        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if f"{self.folder}/" in " ".join(process.cmdline()):
                    found.update({one.pid: one for one in [process, *process.children(recursive=True)]})
        titles = {}
        for pid, process in found.items():
            with contextlib.suppress(psutil.Error):
                titles[pid] = " ".join(process.cmdline())
        return [found[pid] for pid, title in titles.items() if word in title]

    def kill(self) -> None:
        """`kill -9` of every process of it."""
        import psutil

        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self.processes(), timeout=10)


@pytest.fixture(scope="session")
def make_ray_head() -> Iterator[Callable[[], RayHead]]:
    """Makes Ray heads, not started yet; they are killed at the end."""
    import tempfile

    heads: list[RayHead] = []

    def make() -> RayHead:
        # Ray's sockets lie in this folder, and a socket's path is at most 107 bytes long.
        heads.append(RayHead(Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))))
        return heads[-1]

    yield make
    for head in heads:
        head.kill()
        shutil.rmtree(head.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_pair(make_ray_head: Callable[[], RayHead]) -> RayHead:
    """A head and a second node, 2 logical GPUs each; the second has `hidden` for itself and the label `files=own`."""
    head = make_ray_head()
    hidden = head.folder / "hidden"
    hidden.mkdir()
    head.start("--num-gpus=2")
    head.join("127.0.0.3", hidden, "--num-cpus=4", "--num-gpus=2", "--labels=files=own")
    return head


@pytest.fixture(scope="session")
def ray_head(make_ray_head: Callable[[], RayHead]) -> RayHead:
    """A running Ray head that all tests share."""
    head = make_ray_head()
    head.start()
    return head


STAND_IN_WORKER = '''
"""A worker that takes no work: it waits for the server, then listens where the real one does."""

import contextlib, pathlib, socket, sys, time
from bridge.state import State

options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
host, _, port = options["--address"].partition(":")
while True:
    with contextlib.suppress(OSError):
        socket.create_connection((host, int(port)), timeout=1).close()
        break
    time.sleep(0.01)
path = State(pathlib.Path(options["--state-dir"])).gateway_socket
path.unlink(missing_ok=True)
listener = socket.socket(socket.AF_UNIX)
listener.bind(str(path))
listener.listen()
while True:
    listener.accept()[0].close()
'''


@pytest.fixture
def stand_in_worker(tmp_path: Path) -> list[str]:
    """Command of a worker that only says when it is ready."""
    script = tmp_path / "stand_in_worker.py"
    script.write_text(STAND_IN_WORKER)
    return [sys.executable, str(script)]


@pytest.fixture
def local_state(tmp_path: Path) -> Iterator[Any]:
    """A fresh state directory; its services are stopped at the end."""
    from bridge import services
    from bridge.state import State

    state = State(tmp_path / "state")
    yield state
    services.stop(state)
    shutil.rmtree(state.ray_temp_dir, ignore_errors=True)


@pytest.fixture
def step_request(tmp_path: Path) -> Callable[..., Any]:
    """Makes a `StepRequest` in the test's folder; give it what differs."""
    from steps import StepRequest

    def make(step_id: str = "step", type: str = "command", **fields: Any) -> StepRequest:
        common = {"workflow_id": "flow", "run_id": "run", "step_name": step_id, "attempt": 1, "timeout_s": 60.0}
        paths = {"plan_dir": str(tmp_path), "working_dir": str(tmp_path), "log_dir": str(tmp_path / "logs")}
        return StepRequest(
            **{**common, **paths, "params": {}, "grace_s": 1.0, "step_id": step_id, "type": type, **fields}
        )

    return make


@pytest.fixture
async def local_dispatch() -> Any:
    """A dispatch to processes on this machine, closed at the end."""
    from bridge.dispatch import LocalDispatch

    dispatch = LocalDispatch()
    dispatch.start()
    yield dispatch
    dispatch.close()


@pytest.fixture
def run_locally(local_dispatch: Any, step_request: Callable[..., Any]) -> Callable[..., Any]:
    """Runs one step through `local_dispatch`: fields as for `step_request`, params by keyword `params`."""

    async def run(*args: Any, **fields: Any) -> Any:
        handle = await local_dispatch.attach_or_start(step_request(*args, **fields))
        return await handle.wait(lambda progress: None)

    return run


@pytest.fixture(scope="session")
def quick_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with `tiny` after seconds of warm start: it answers some questions of `simple`, and so can learn."""
    import torch

    from rl.tiny import make_tiny
    from rl.types import Task
    from rl.warm_start import WarmStart

    threads = torch.get_num_threads()
    lessons = ((Task(name="simple"), 300),)
    folder = tmp_path_factory.mktemp("models") / "quick"
    recipe = WarmStart(lessons=lessons, haste=0.5, steps=90, batch_size=16, learning_rate=2e-3, warmup_steps=5)
    # Two threads that wait for each other by spinning take many times as long on a busy machine.
    torch.set_num_threads(1)
    make_tiny(folder, 0, recipe)
    torch.set_num_threads(threads)
    return str(folder)


@pytest.fixture
async def browser() -> AsyncIterator[Any]:
    """Headless Chromium of this system, driven by Playwright."""
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    program = next((path for name in names if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"there is no {' or '.join(names)}")
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        # In a container, Chromium runs as root, which its sandbox refuses.
        started = await playwright.chromium.launch(executable_path=program, chromium_sandbox=False)
        yield started
        await started.close()


STACK_RUN = """
import asyncio, json, os, signal, sys
from pathlib import Path
from rl.config import RunConfig
from rl.train import train

config, folder, kills = RunConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])

def process_of(part):
    processes = [path.read_text().splitlines() for path in folder.glob("stacks/*.process")]
    return int(max((one for one in processes if one[0] == part), key=lambda one: float(one[3]))[2])

def report(event):
    print(event.model_dump_json(), flush=True)
    if event.event == "update" and kills and event.train.update >= kills[0][0]:
        os.kill(process_of(kills.pop(0)[1]), signal.SIGKILL)

result = asyncio.run(train(config, str(folder), report=report))
print(json.dumps({"event": "result", **json.loads(result.model_dump_json())}))
"""


class StackRun:
    """A small run of real parts in a process of its own, which knows nothing of this one's Ray and vLLM."""

    def __init__(self, model: str) -> None:
        self._model = model

    def config(
        self,
        *,
        engine: EngineName = "vllm",
        reproducible: bool = False,
        evaluation_prompts: int = 2,
        **settings: Any,
    ) -> RunConfig:
        return RunConfig(
            model=self._model,
            groups_per_update=2,
            group_size=4,
            groups_in_flight=2,
            filter_zero_variance=False,
            evaluation_prompts=evaluation_prompts,
            rollout=RolloutSettings(prompt_style="brief", max_tokens=160, max_tokens_per_turn=20),
            engine=EngineConfig(name=engine, cache_gb=0.05, max_model_tokens=256, reproducible=reproducible),
            **settings,
        )

    def events(
        self, config: RunConfig, folder: Path, kills: Sequence[tuple[int, str]] = (), **environment: str
    ) -> "StackEvents":
        """What it said, and its result as the last event. `kills`: from which update on which part is killed."""
        arguments = (config.model_dump_json(), str(folder), json.dumps(kills))
        said = self.output(STACK_RUN, *arguments, **environment)
        return StackEvents(json.loads(line) for line in said if line.startswith("{"))

    def output(self, script: str, *arguments: str, **environment: str) -> list[str]:
        """Lines of a script."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OMP_"))}
        ran = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            env={**inherited, **environment},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert ran.returncode == 0, ran.stderr[-4000:]
        return ran.stdout.splitlines()

    def processes(self, folder: Path) -> list[tuple[int, bool]]:
        """Those that hosted parts of the run in this folder, and whether each is alive."""
        written = [path.read_text().splitlines() for path in folder.glob("stacks/*.process")]
        return [(int(pid), self._is_alive(int(pid), float(began))) for _, _, pid, began in written]

    def _is_alive(self, pid: int, began: float) -> bool:
        try:
            process = psutil.Process(pid)
            return process.create_time() == began and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class StackEvents(list[dict[str, Any]]):
    """The events of a run."""

    def of(self, event: str) -> list[dict[str, Any]]:
        return [one for one in self if one["event"] == event]

    @property
    def losses(self) -> list[tuple[float, float]]:
        """Loss and norm of the gradient of every update."""
        return [(one["train"]["loss"], one["train"]["gradient_norm"]) for one in self.of("update")]


@pytest.fixture
def stack_run(quick_model: str) -> StackRun:
    return StackRun(quick_model)


@contextlib.asynccontextmanager
async def _served_client(address: str, folder: Path, *, local: bool) -> AsyncIterator[Any]:
    from bridge.activities import Activities
    from bridge.cache import StepCache
    from bridge.client import Client
    from bridge.dispatch import LocalDispatch
    from bridge.state import State
    from bridge.temporal import connect_temporal
    from bridge.worker import make_worker

    state = State(folder / "state").create()
    temporal = await connect_temporal(address, None, state)
    dispatch = LocalDispatch()
    dispatch.start()
    activities = Activities(lambda call: dispatch, StepCache(state.cache_file), state.secrets_dir)
    queue = f"queue-{uuid.uuid4().hex}"
    async with make_worker(temporal, queue, activities, drain_s=0):
        yield Client(temporal, queue, state, local=local)
    dispatch.close()


@pytest.fixture
def open_client() -> Callable[..., contextlib.AbstractAsyncContextManager[Any]]:
    """Opens a client whose runs are served by a worker in this process; its state is in `folder / "state"`."""
    return _served_client


@pytest.fixture(scope="session")
def sharp_models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Any]]:
    """Two models of one shape, in folders and in memory, far from uniform, so that a wrong weight shows."""
    import torch

    from rl.models import save_model
    from rl.tiny import new_tiny
    from rl.tokenizer import TinyTokenizer

    made = []
    for seed in (0, 1):
        model: Any = new_tiny(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        folder = str(tmp_path_factory.mktemp("models") / str(seed))
        save_model(model, TinyTokenizer(), folder)
        made.append((folder, model.eval()))
    return made
