"""`orchestrate job` from the shell: real services, a real engine, and everything killed that can be."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bridge import services
from bridge.cli.main import main
from bridge.current_cluster import CurrentCluster, use_cluster
from bridge.runs import Runs
from bridge.state import State
from bridge.temporal import connect_temporal

pytestmark = [pytest.mark.docker, pytest.mark.temporal]

ORCHESTRATE = str(Path(sys.executable).with_name("orchestrate"))
PATIENCE_S = 60.0
STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d"
COUNT = "for n in $(seq {}); do echo line $n; echo odd $n >&2; sleep 0.1; done"


class Shop:
    """A project, its container root and its services; runs `orchestrate job` there."""

    def __init__(self, folder: Path, image: str) -> None:
        self.state = State(folder / "home")
        self.root, self.project = folder / "root", folder / "project"
        self.project.mkdir()
        ours = ("ORCHESTRATE_", "TEMPORAL_", "SYGALDRY_", "RAY_")
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        self.env |= {
            "ORCHESTRATE_HOME": str(self.state.dir),
            "SYGALDRY_CONTAINER_ROOT": str(self.root),
            "SYGALDRY_IMAGE": image,
            "SYGALDRY_PROJECT_ID": "shop",
        }

    def __call__(self, *words: str, code: int | None = 0, **env: str) -> str:
        """What `orchestrate job WORDS` prints; `code` is the exit code it must have."""
        done = subprocess.run(
            [ORCHESTRATE, "job", *words],
            cwd=self.project,
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert code is None or done.returncode == code, (words, done.returncode, done.stdout, done.stderr)
        self.errors = done.stderr
        return done.stdout

    def json(self, *words: str, code: int | None = 0) -> Any:
        """The document it prints with `--json`."""
        at = words.index("--") if "--" in words else len(words)
        return json.loads(self(*words[:at], "--json", *words[at:], code=code))

    def run(self, job: str, *words: str) -> dict[str, Any]:
        """Start a job, with the options and the command in `words`; its document."""
        document: dict[str, Any] = self.json("run", "--job", job, *words)
        return document

    def wait(self, job: str, code: int = 0) -> dict[str, Any]:
        """The document of a job that has ended."""
        document: dict[str, Any] = self.json("wait", "--job", job, "--timeout", f"{PATIENCE_S - 10}", code=code)
        return document

    def until_printed(self, document: dict[str, Any], text: str) -> None:
        """Wait until the raw log holds a text."""
        log = Path(document["paths"]["raw_log"])
        until(f"`{text}` in the log", lambda: text in log.read_text())

    def kill(self, *names: str) -> None:
        """`kill -9` of services."""
        for process in services.status(self.state)["processes"]:
            if process["name"] in names:
                os.kill(process["pid"], signal.SIGKILL)


def until(what: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for: {what}"
        time.sleep(0.05)


def events(document: dict[str, Any]) -> list[str]:
    return [json.loads(line)["event"] for line in Path(document["paths"]["events"]).read_text().splitlines()]


@pytest.fixture
def make_shop(tmp_path_factory: pytest.TempPathFactory, small_image: str, docker_engine: Any) -> Iterator[Any]:
    yield from shops(tmp_path_factory, small_image, docker_engine)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, small_image: str, docker_engine: Any) -> Iterator[Shop]:
    """One for all tests that do not kill what others need."""
    for make in shops(tmp_path_factory, small_image, docker_engine):
        yield make()


def shops(factory: pytest.TempPathFactory, image: str, engine: Any) -> Iterator[Callable[[], Shop]]:
    made: list[Shop] = []

    def make() -> Shop:
        made.append(Shop(factory.mktemp("shop"), image))
        return made[-1]

    yield make
    for shop in made:
        services.stop(shop.state)
        shutil.rmtree(shop.state.ray_temp_dir, ignore_errors=True)
        for container in engine.containers.list(all=True, filters={"label": "orchestrate.project_id=shop"}):
            if any(mount["Source"].startswith(str(shop.root)) for mount in container.attrs["Mounts"]):
                container.remove(force=True)


def test_a_job_runs_and_its_files_are_the_familiar_ones(shop: Shop) -> None:
    (shop.project / "data").write_text("from the project\n")
    arguments = ["a", "b c", "$HOME", "${{ x }}", "it's", '"', "two\nlines", ""]
    script = 'printf "<%s>" "$@"; cat data'
    printed = shop("run", "--job-name", "first", "--", "bash", "-c", script, "-", *arguments)
    assert shop("wait", "--job", "first") == shop("status", "--job", "first")
    found = shop.json("status", "--job", "first")
    assert re.fullmatch(f"DONE job=first ts={STAMP} rc=0", found["line"])
    for path in (*found["paths"].values(), found["run"], found["workflow_id"]):
        assert path in printed or path == found["paths"]["records"]
    logs, jobs = shop.root / "logs", shop.root / "bazel_cache" / "zephyr_jobs"
    name = f"first-{found['run']}"
    assert (jobs / "first.status").read_text() == (jobs / f"{name}.status").read_text() == f"{found['line']}\n"
    assert events(found) == ["start", "progress", "done"] and found["paths"]["events"] == str(jobs / f"{name}.jsonl")
    assert (logs / f"{name}.pid").read_text().strip().isdecimal()
    output = "".join(f"<{argument}>" for argument in arguments) + "from the project\n"
    assert (logs / f"{name}.log").read_text() == output
    assert shop("tail", "--job", "first", "--lines", "1") == "lines><>from the project\n"
    assert shop("tail", "--job", "first", "--events").count("\n") == 3
    (listed,) = [job for job in shop.json("list") if job["job"] == "first"]
    assert {**listed, "duration_s": 0} == {**found, "duration_s": 0}
    assert "first" in shop("list") and "first" not in shop("list", "--project-id", "other")
    assert shop("health", "--job", "first").startswith("ended\nDONE ")


def test_names_are_whole_names(shop: Shop) -> None:
    for name in ("train", "train-2", "tra"):
        shop.run(name, "--", COUNT.format(600))
    assert shop("stop", "--job", "train").startswith("STOPPED job=train ts=")
    for name in ("train-2", "tra"):
        assert shop("status", "--job", name).startswith(("START", "PROGRESS"))
        assert shop.json("health", "--job", name)["health"] == "running"
    for command in ("status", "stop", "tail", "wait", "health"):
        shop(command, "--job", "trai", code=2)
        assert "no job `trai`" in shop.errors and "did you mean" in shop.errors
    shop("status", "--job", "train", "--project-id", "other", code=2)
    shop("stop", "--job", "tra")
    assert shop("wait", "--job", "train-2", "--timeout", "0", code=124).startswith("PROGRESS")
    shop("stop", "--job", "train-2")


def test_stop_lets_a_job_say_its_last_words(shop: Shop) -> None:
    started = shop.run("polite", "--", "trap 'echo saved; exit 7' TERM; echo up; while :; do sleep 0.05; done")
    shop.until_printed(started, "up")
    found = shop.json("stop", "--job", "polite")
    assert (found["state"], found["rc"]) == ("STOPPED", None) and events(found)[-1] == "stopped"
    assert "saved\n" in Path(found["paths"]["raw_log"]).read_text()
    assert shop("stop", "--job", "polite", code=1) == shop("wait", "--job", "polite", code=130)
    assert shop("health", "--job", "polite", code=1).startswith("ended\nSTOPPED ")


def test_the_pid_file_names_the_process_whose_end_stops_the_job(shop: Shop) -> None:
    started = shop.run("by-pid", "--", "echo up; sleep 600")
    shop.until_printed(started, "up")
    os.kill(int(Path(started["paths"]["pid"]).read_text()), signal.SIGTERM)
    assert shop.wait("by-pid", code=130)["state"] == "STOPPED"


def test_following_shows_every_line_once_and_ends_with_the_job(shop: Shop) -> None:
    started = shop.run("followed", "--", COUNT.format(20))
    lines = shop("tail", "-f", "--job", "followed", "--lines", "1000").splitlines()
    assert sorted(lines) == sorted(f"{word} {n}" for n in range(1, 21) for word in ("line", "odd"))
    assert sorted(Path(started["paths"]["raw_log"]).read_text().splitlines()) == sorted(lines)
    records = shop("tail", "--job", "followed", "--json", "--lines", "3").splitlines()
    assert [json.loads(record)["stepName"] for record in records] == ["followed"] * 3


def test_a_launch_that_fails_is_never_hidden_by_an_earlier_end(shop: Shop) -> None:
    first = shop.run("again", "--", "true")
    assert shop.wait("again")["state"] == "DONE"
    second = shop.run("again", "--image", "no.such.host.invalid/image:1", "--", "true")
    found = shop.wait("again", code=1)
    assert (found["run"], found["state"], found["rc"]) == (second["run"], "FAILED", 125) and "image" in found["msg"]
    assert (shop.root / "bazel_cache/zephyr_jobs/again.status").read_text() == f"{found['line']}\n"
    shop("run", "--job", "again", "--secret", "NOBODY_KNOWS", "--", "true", code=2)
    found = shop.json("status", "--job", "again")
    assert (found["state"], found["rc"]) == ("FAILED", 125) and found["run"] != second["run"]
    shop("run", "--job", "again", "--address", "127.0.0.1:99999", "--", "true", code=3)
    assert "not launched" in shop.json("status", "--job", "again")["msg"]
    assert shop("status", "--job", "again", "--run", first["run"]).startswith("DONE ")
    shop("status", "--job", "again", "--run", "never", code=2)


def test_limits_retries_secrets_and_the_options_of_the_container(shop: Shop) -> None:
    (shop.project / "extra").mkdir()
    shop.run("late", "--timeout", "1", "--", "sleep 600")
    words = ["--retries", "1", "--secret", "TOKEN=JOB_TOKEN", "--env", "GIVEN=a b", "--env", "TAKEN"]
    words += ["--mount", "extra:/extra", "--memory", "64MiB", "--cpus", "0.5", "--network", "none"]
    script = 'echo "$GIVEN $TAKEN $TOKEN"; touch /extra/$STEP_ATTEMPT; exit $((3 * (2 - STEP_ATTEMPT)))'
    shop("run", "--job", "flaky", *words, "--", script, TAKEN="taken", JOB_TOKEN="hunter2-hunter2")
    found = shop.wait("flaky")
    assert found["attempt"] == 2 and Path(found["paths"]["raw_log"]).read_text() == "a b taken ***\n" * 2
    assert sorted(path.name for path in (shop.project / "extra").iterdir()) == ["1", "2"]
    assert events(found) == ["start", "progress", "progress", "done"]
    grep = subprocess.run(["grep", "-rl", "hunter2-hunter2", shop.root, shop.state.dir], capture_output=True, text=True)
    assert grep.stdout == ""
    assert shop.wait("late", code=1)["line"].endswith(" rc=124")


def test_a_credential_in_env_is_handed_over_as_a_secret(shop: Shop, docker_engine: Any) -> None:
    shop.run("before", "--wait", "--", "true")  # So that the services run, and do not know what follows.
    token, login = "hf_0f9a7c-token", "https://me:open-sesame@index.invalid/simple"
    words = ["--env", "HF_TOKEN", "--env", f"INDEX={login}", "--env", "OPEN=in the open", "--secret", "T=OTHER_TOKEN"]
    script = 'echo "$HF_TOKEN $INDEX $T $OPEN"; echo ${#HF_TOKEN} ${#INDEX}; until [ -e go ]; do sleep 0.05; done'
    shop("run", "--job", "login", *words, "--", script, HF_TOKEN=token, OTHER_TOKEN="hunter3-hunter3")
    found = shop.json("status", "--job", "login")
    shop.until_printed(found, f"{len(token)} {len(login)}\n")
    (container,) = [
        each
        for each in docker_engine.containers.list(filters={"label": "orchestrate.project_id=shop"})
        if found["workflow_id"] in each.labels["orchestrate.key"]
    ]
    described = json.dumps(docker_engine.api.inspect_container(container.id))
    history = asyncio.run(input_of(shop, found["workflow_id"]))
    (shop.project / "go").touch()
    found = shop.wait("login")
    assert Path(found["paths"]["raw_log"]).read_text().startswith("*** *** *** in the open\n")
    assert "in the open" in described and "in the open" in history
    for value in (token, login):
        assert value not in described and value not in history
        grep = subprocess.run(["grep", "-rlF", value, shop.root, shop.state.dir], capture_output=True, text=True)
        assert grep.stdout == ""


async def input_of(shop: Shop, workflow_id: str) -> str:
    """What Temporal keeps as the start of a run, decoded."""
    running = services.find(shop.state)
    assert running is not None
    runs = Runs(await connect_temporal(running.address, None, shop.state))
    return (await runs.input(workflow_id, await runs.newest(workflow_id))).model_dump_json()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--address", "127.0.0.1:1"], "`orchestrate secret set HF_TOKEN` where the worker runs"),
        (["--secret", "HF_TOKEN"], "leave one of them away"),
        (["--secret", "OTHER=HF_TOKEN"], "leave one of them away"),
    ],
)
def test_a_credential_that_cannot_be_handed_over_is_refused(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SYGALDRY_CONTAINER_ROOT", str(tmp_path / "root"))
    assert main(["job", "run", "--job", "x", "--env", "HF_TOKEN=hf_0f9a7c", *words, "--", "true"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and "hf_0f9a7c" not in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_reserves_gpus_stays_with_the_engine_when_a_cluster_is_up(make_shop: Callable[[], Shop]) -> None:
    shop = make_shop()
    use_cluster(shop.state.create(), CurrentCluster("far", "ray://127.0.0.1:1", "", ""))
    gpus = json.dumps({"GPU": 2})
    shop("run", "--job", "reserved", "--gpus", "2", "--", "true", RAY_OVERRIDE_RESOURCES=gpus)
    shop("wait", "--job", "reserved", "--timeout", f"{PATIENCE_S - 10}", code=None)
    found = shop.json("status", "--job", "reserved")
    # It has reached the engine of this machine, which can give GPUs or can not.
    assert found["state"] == "DONE" or "this Docker Engine has no NVIDIA runtime" in found["msg"], found


def test_wait_with_run_shows_the_output_and_the_end(shop: Shop) -> None:
    printed = shop("run", "--job", "shown", "--wait", "--", "echo out; exit 6", code=1)
    assert re.fullmatch(f"out\nFAILED job=shown ts={STAMP} rc=6\n", printed)
    assert "workflow job-shop-shown-" in shop.errors and "ended with exit code 6" in shop.errors
    found = shop.json("run", "--job", "shown", "--wait", "--", "echo out")
    assert found["state"] == "DONE" and "out\n" in shop.errors


def test_a_job_is_not_started_twice_under_one_name(shop: Shop) -> None:
    started = shop.run("once", "--", "sleep 600")
    shop("run", "--job", "once", "--", "true", code=2)
    assert started["run"] in shop.errors and "hint: " in shop.errors
    shop("run", "--job", "once", "--project-id", "elsewhere", "--wait", "--", "true")
    shop("stop", "--job", "once")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--job", "x"], "there is no command"),
        (["run", "--job", "x", "--"], "there is no command"),
        (["run", "--job", "x", "stray", "--", "true"], "stray"),
        (["run", "--job", "x", "--bogus", "--", "true"], "--bogus"),
        (["run", "--job", "../x", "--", "true"], "job is `../x`"),
        (["run", "--project-id", "../p", "--job", "x", "--", "true"], "project"),
        (["run", "--job", "x", "--gpus", "some", "--", "true"], "--gpus"),
        (["run", "--job", "x", "--env", "NOT_SET_ANYWHERE", "--", "true"], "--env"),
        (["run", "--job", "x", "--mount", "here", "--", "true"], "--mount"),
        (["run", "--job", "x", "--heartbeat", "0.5", "--", "true"], "--heartbeat"),
        (["run", "--job", "x", "--timeout", "soon", "--", "true"], "soon"),
        (["wait", "--job", "x", "--timeout", "-1"], "-1"),
        (["status"], "--job"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SYGALDRY_CONTAINER_ROOT", str(tmp_path / "root"))
    assert main(["job", *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_job_belongs_to_the_service_that_was_asked_to_run_it(
    make_shop: Callable[[], Shop], temporal_server: str
) -> None:
    shop = make_shop()
    there = ["--address", temporal_server, "--task-queue", "job-test"]
    started = shop.run("far", *there, "--", "true")
    assert "no worker serves" in shop.errors
    assert shop("status", "--job", "far", TEMPORAL_ADDRESS="127.0.0.1:1").startswith("START ")
    worker = subprocess.Popen([ORCHESTRATE, "worker", *there], cwd=shop.project, env=shop.env, process_group=0)
    try:
        assert shop.wait("far")["run"] == started["run"]
    finally:
        worker.terminate()
        worker.wait(PATIENCE_S)
    assert services.find(shop.state) is None


def test_a_job_survives_the_death_of_everything_but_itself(make_shop: Callable[[], Shop]) -> None:
    shop = make_shop()
    started = shop.run("long", "--heartbeat", "1", "--", COUNT.format(100))
    shop.until_printed(started, "line 5\n")
    pid = Path(started["paths"]["pid"]).read_text()
    shop.kill("worker")
    shop.until_printed(started, "line 25\n")
    # Nobody is left who would start anything again, or say that the job goes on.
    shop.kill("supervisor", "worker", "temporal")
    assert shop("health", "--job", "long", "--stale-after", "0.1", code=4).startswith(f"stale pid={pid}")
    assert shop("health", "--job", "long", "--stale-after", "60").startswith(f"running pid={pid}")
    assert services.find(shop.state) is None
    assert shop("status", "--job", "long").startswith("PROGRESS ")
    found = shop.wait("long")
    assert (found["state"], found["attempt"]) == ("DONE", 1)
    lines = Path(found["paths"]["raw_log"]).read_text().splitlines()
    assert sorted(lines) == sorted(f"{word} {n}" for n in range(1, 101) for word in ("line", "odd"))
    assert events(found)[0] == "start" and events(found)[-1] == "done" and events(found).count("done") == 1
    assert set(events(found)[1:-1]) == {"progress"} and len(events(found)) > 5


def containers_of(engine: Any, document: dict[str, Any]) -> list[Any]:
    """Containers of a job that run or have ended."""
    found = engine.containers.list(all=True, filters={"label": "orchestrate.project_id=shop"})
    return [each for each in found if each.labels["orchestrate.key"].startswith(f"{document['workflow_id']}/")]


def test_down_ends_a_job_with_its_container_and_the_job_goes_on_afterwards(
    make_shop: Callable[[], Shop], docker_engine: Any
) -> None:
    shop = make_shop()
    script = "trap '' TERM; echo up; [ $STEP_ATTEMPT = 1 ] || exit 0; while :; do sleep 1; done"
    words = ["--job", "kept", "--secret", "TOKEN=JOB_TOKEN", "--json", "--", script]
    started = json.loads(shop("run", *words, JOB_TOKEN="hunter2-hunter2"))
    shop.until_printed(started, "up\n")
    (container,) = containers_of(docker_engine, started)
    mounts = {mount["Destination"]: mount["Source"] for mount in container.attrs["Mounts"]}
    secrets = Path(mounts["/run/sygaldry/secrets"])
    assert secrets.exists()
    # The job outlasts the process that attends to it: nobody else would end it.
    ended = services.stop(shop.state).killed
    assert f"container {container.name}" in [command for _, command in ended]
    assert containers_of(docker_engine, started) == [] and not secrets.exists()
    found = shop.wait("kept")
    assert (found["state"], found["attempt"]) == ("DONE", 2)


def test_a_job_whose_services_and_their_state_are_gone(make_shop: Callable[[], Shop], docker_engine: Any) -> None:
    shop = make_shop()
    left = shop.run("left", "--", "echo up; while [ ! -e gate ]; do sleep 0.1; done; echo through; exit 3")
    lost = shop.run("lost", "--", "echo up; sleep 600")
    orphan = shop.run("orphan", "--", "echo up; sleep 600")
    for document in (left, lost, orphan):
        shop.until_printed(document, "up")
    shop.kill("supervisor", "worker", "temporal")
    pid = int(Path(lost["paths"]["pid"]).read_text())
    psutil.Process(pid).kill()
    until("the process is gone", lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")
    assert len(containers_of(docker_engine, lost)) == 1
    assert shop("health", "--job", "lost", code=4).startswith(f"stale pid={pid}\n")
    shutil.rmtree(shop.state.dir)
    # Nobody knows the three runs any more: one has gone, two go on all the same.
    assert re.fullmatch(f"LOST job=lost ts={STAMP}\n", shop("status", "--job", "lost"))
    assert containers_of(docker_engine, lost) == []
    assert shop("wait", "--job", "lost", code=1) == shop("status", "--job", "lost")
    assert shop("health", "--job", "lost", code=1).startswith("ended\nLOST ")
    assert events(lost)[-1] == "lost"
    assert shop("status", "--job", "left").startswith("PROGRESS ")
    assert shop("stop", "--job", "orphan").startswith("STOPPED ")
    (shop.project / "gate").touch()
    found = shop.wait("left", code=1)
    assert (found["state"], found["rc"]) == ("FAILED", 3)
    assert Path(found["paths"]["raw_log"]).read_text() == "up\nthrough\n"
