"""Ray alone, without us or with our wrapper: what an actor costs on the host, in an image, and as a job.

    one    a new actor (or job) until its first answer
    chain  calls of one warm actor, one after another
    fan    the same at once

`peer_ray.py host|image|image_uri|job IMAGE`. `image` starts the worker as ours do, `image_uri` is Ray's own
way, which needs podman.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from runner import Absent, Measure, serve

CALL_TIMEOUT_S = 60
COPY_TIMEOUT_S = 600


class Actor:
    """Answers at once."""

    def __init__(self) -> None:
        if folder := os.environ.get("ORCHESTRATE_ACTOR_FOLDER"):
            # As our own actors tell the wrapper.
            Path(folder, "up").touch()

    def nothing(self) -> None:
        """Return."""


class Actors:
    """Actors made with the same options."""

    def __init__(self, options: Callable[[], dict[str, Any]]) -> None:
        self._options = options
        self._warm: Any = None

    def measure(self, shape: str, count: int) -> float | None:
        """Seconds of one shape; None for one that says nothing here."""
        import ray

        if shape == "cached":
            return None
        if shape != "one" and self._warm is None:
            self._warm = self._new()
        started = time.perf_counter()
        if shape == "one":
            actor = self._new()
        elif shape == "chain":
            for _ in range(count):
                ray.get(self._warm.nothing.remote(), timeout=CALL_TIMEOUT_S)
        else:
            ray.get([self._warm.nothing.remote() for _ in range(count)], timeout=CALL_TIMEOUT_S)
        duration_s = time.perf_counter() - started
        if shape == "one":
            ray.kill(actor)
        return duration_s

    def _new(self) -> Any:
        import ray

        actor = ray.remote(Actor).options(num_cpus=1, **self._options()).remote()
        ray.get(actor.nothing.remote(), timeout=CALL_TIMEOUT_S)
        return actor


class Jobs:
    """Ray's own jobs: `true` submitted to the head."""

    def __init__(self, address: str) -> None:
        from ray.job_submission import JobSubmissionClient

        self._client = JobSubmissionClient(address)
        started = time.perf_counter()
        while True:
            try:
                self.measure("one", 1)
                return
            except RuntimeError:
                # The agent that starts jobs comes up a moment after the head.
                if time.perf_counter() - started > CALL_TIMEOUT_S:
                    raise
                time.sleep(0.2)

    def measure(self, shape: str, count: int) -> float | None:
        """Seconds of one job; None for more, which take as long each."""
        if shape != "one":
            return None
        started = time.perf_counter()
        job = self._client.submit_job(entrypoint="true")
        while not self._client.get_job_status(job).is_terminal():
            if time.perf_counter() - started > CALL_TIMEOUT_S:
                raise TimeoutError(f"job {job} has not ended")
            time.sleep(0.02)
        return time.perf_counter() - started


def in_image(image: str) -> Callable[[], dict[str, Any]]:
    """Options that start the worker in the image as ours do."""
    import uuid

    from cluster.checks import check_image
    from cluster.images import Placing
    from cluster.shape import ResourceShape

    found = check_image(image, "", False)
    if found.error:
        raise Absent(found.error)
    shape = ResourceShape(image=image, pinned=found.pinned)
    return lambda: Placing((), found).options(shape, f"bench-{uuid.uuid4().hex[:12]}")


def in_image_by_ray(image: str, folder: Path) -> Callable[[], dict[str, Any]]:
    """Options for Ray's own way; the image is copied to podman when it has none of that name."""
    if shutil.which("podman") is None:
        raise Absent("Ray's `image_uri` needs podman, which is not installed (Debian package `podman`)")
    # Podman asks for more files and processes than every machine lets it.
    config = folder / "containers.conf"
    config.write_text('[containers]\ndefault_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]\n')
    os.environ["CONTAINERS_CONF"] = str(config)
    known = subprocess.run(["podman", "image", "exists", image], check=False, timeout=CALL_TIMEOUT_S)
    if known.returncode:
        subprocess.run(["podman", "pull", "--quiet", f"docker-daemon:{image}"], check=True, timeout=COPY_TIMEOUT_S)
    asked = ["podman", "run", "--rm", "--userns=keep-id", "--network=host", "--entrypoint=python", image, "--version"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=CALL_TIMEOUT_S)
    if done.returncode:
        raise Absent(f"podman does not do what Ray's `image_uri` asks of it: {done.stderr.strip()}")
    return lambda: {"runtime_env": {"image_uri": image}}


@contextmanager
def opened(folder: Path) -> Iterator[Measure]:
    """A Ray head of its own, with a token."""
    kind, image = sys.argv[1:3]
    if not image and kind.startswith("image"):
        raise Absent("no image of ours with this Ray is on this machine: `orchestrate container build`, or --image")
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(os.urandom(32).hex())
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    import ray

    options: Callable[[], dict[str, Any]] = dict
    if kind == "image":
        options = in_image(image)
    elif kind == "image_uri":
        options = in_image_by_ray(image, folder)
    context = ray.init(
        num_cpus=4, include_dashboard=kind == "job", _temp_dir=str(folder), logging_level="error", log_to_driver=False
    )
    try:
        if kind == "job":
            yield Jobs(f"http://{context.dashboard_url}").measure
        else:
            yield Actors(options).measure
    finally:
        ray.shutdown()


if __name__ == "__main__":
    serve(version("ray"), opened)
