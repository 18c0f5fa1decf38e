"""Fixtures shared by the test files: real parts, started on loopback and stopped at the end."""

import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from steps import StepCancelled


class RecordingContext:
    """A step's context that keeps what the step says; processes are real."""

    def __init__(self, folder: Path, env: Mapping[str, str], secrets: Mapping[str, str], key: str) -> None:
        self.key = key
        self.attempt = int(key.rpartition("/")[2])
        self.plan_dir = self.working_dir = folder
        self.attempt_dir = folder / f"attempt-{self.attempt}"
        self.attempt_dir.mkdir(exist_ok=True)
        self.env = {"PATH": "/usr/bin:/bin", "HOME": str(folder), **env}
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
    import sys

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
        import os

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
