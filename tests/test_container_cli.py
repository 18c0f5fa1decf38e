"""`orchestrate container` on a real engine: foreground containers, a repository's environment, the image's verbs."""

import contextlib
import fcntl
import io
import itertools
import json
import os
import pty
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
import uuid
import zipfile
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from bridge.cli.container_request import _port
from container.command_line import docker_run
from container.image_spec import ImageSpec
from container.launch import SECRETS_IN_CONTAINER, Job, run_options
from container.standard_image import standard_image

pytestmark = pytest.mark.docker

CLI = [sys.executable, "-m", "bridge.cli.main", "container"]
LAUNCHER = Path(__file__).parent.parent / "container" / "launch_container.sh"


def until(condition, timeout_s=60):
    """Wait until `condition()` is true; its value."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return value


class Commands:
    """Runs the command in a workspace of the test's own, with the small image and caches beside it."""

    def __init__(self, folder, image, engine):
        self.engine, self.workspace, self.root = engine, folder / "my repo", folder / "root"
        self.workspace.mkdir()
        self.name = f"cli-test-{uuid.uuid4().hex[:12]}"
        self.started = []
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SYGALDRY_", "HF_", "http"))}
        self.env = {
            **kept,
            "PYTHONPATH": str(Path(__file__).parent.parent),
            "SYGALDRY_IMAGE": image,
            "SYGALDRY_CONTAINER_ROOT": str(self.root),
            "SYGALDRY_GPU": "false",
            "ORCHESTRATE_HOME": str(folder / "home"),
        }

    def start(self, *arguments, argv=CLI, env=None, **options):
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        process = subprocess.Popen(
            [*argv, *map(str, arguments)], cwd=self.workspace, env={**self.env, **(env or {})}, text=True, **options
        )
        self.started.append(process)
        return process

    def run(self, *arguments, text=None, **options):
        process = self.start(*arguments, **({"stdin": subprocess.PIPE} if text is not None else {}), **options)
        output, errors = process.communicate(text, timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def containers(self):
        return self.engine.containers.list(all=True, filters={"name": f"^/{self.name}"}, ignore_removed=True)

    def container(self):
        """Our container, once it runs."""
        return until(lambda: next((each for each in self.containers() if each.status == "running"), None))


@pytest.fixture
def commands(tmp_path, small_image, docker_engine):
    made = Commands(tmp_path, small_image, docker_engine)
    yield made
    for process in made.started:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=30)
    until(lambda: not made.containers())


@pytest.mark.parametrize(
    ("command", "code", "output"),
    [
        ("printf '%s|' a 'b  c' '$HOME' \"$PWD\"", 0, "a|b  c|$HOME|/workspace|"),
        ("echo out; echo err >&2; exit 7", 7, "out\n"),
        ("kill -TERM $$", 143, ""),
    ],
)
def test_the_exit_code_and_the_output_are_the_container_s(commands, command, code, output):
    done = commands.run("launch", "--name", commands.name, "--", "bash", "-c", command)
    assert (done.returncode, done.stdout) == (code, output)
    assert done.stderr == ("err\n" if "err" in command else "")
    assert commands.containers() == []


def test_stdin_is_passed_on_and_there_is_a_terminal_only_for_who_has_one(commands):
    done = commands.run("launch", "--", "bash", "-c", "cat; test -t 0 || echo no terminal", text="data\n")
    assert done.stdout == "data\nno terminal\n" and done.returncode == 0


def test_a_program_that_is_not_there_ends_with_127(commands):
    assert commands.run("shell", "no-such-program").returncode == 127
    assert commands.run("launch", "--entrypoint", "run-job").returncode == 2


def record(container):
    """What the engine keeps of a container, but for what differs from one to the next."""
    container.reload()
    found = container.attrs
    config, host = dict(found["Config"]), dict(found["HostConfig"])
    config["Labels"] = {key: value for key, value in config["Labels"].items() if key != "orchestrate.owner"}
    config.pop("Hostname")
    config["Env"].sort()
    return {"config": config, "host": host, "path": found["Path"], "args": found["Args"], "name": found["Name"]}


def test_a_dry_run_prints_the_call_that_is_made(commands, tmp_path, docker_engine):
    (tmp_path / "data, more").mkdir()
    options = ["--name", commands.name, "--memory", "64MiB", "--cpus", "0.5", "--network", "bridge"]
    options += ["--mount", f"{tmp_path}/data, more:/data:ro", "--env", 'WORDS=it\'s a "b" $c', "--env", "FROM_SHELL"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options += ["--port", f"{port}:80", "--project-id", "proj", "--entrypoint", "run-job"]
    command = ["--", "bash", "-c", "trap 'exit 0' TERM; echo \"$WORDS $FROM_SHELL\"; while :; do sleep 0.05; done"]
    env = {"FROM_SHELL": "shell"}
    shown = commands.run("launch", "--dry-run", *options, *command, env=env)
    assert shown.returncode == 0 and shown.stdout.startswith("docker run --rm ") and commands.containers() == []
    launched = commands.start("launch", *options, *command, env=env)
    assert launched.stdout.readline() == 'it\'s a "b" $c shell\n'
    real = record(commands.container())
    launched.terminate()
    assert launched.wait(60) == 0
    until(lambda: not commands.containers())
    pasted = commands.start(argv=["bash", "-c", shown.stdout])
    assert pasted.stdout.readline() == 'it\'s a "b" $c shell\n'
    assert record(commands.container()) == real
    commands.container().kill("TERM")
    assert pasted.wait(60) == 0

    assert (real["host"]["Memory"], real["host"]["NanoCpus"]) == (64 << 20, 500_000_000)
    assert real["host"]["PortBindings"] == {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(port)}]}
    assert real["host"]["AutoRemove"] and real["host"]["Init"] and not real["config"]["Tty"]
    mounts = {each["Target"]: (each["Source"], each.get("ReadOnly", False)) for each in real["host"]["Mounts"]}
    assert mounts["/data"] == (f"{tmp_path}/data, more", True)
    assert mounts["/workspace"] == (str(commands.workspace), False)
    for folder, goal in (("monorepo_home", "/home/kvothe"), ("hf_cache", "/opt/hf_cache")):
        assert mounts[goal] == (str(commands.root / folder), False)
    labels = real["config"]["Labels"]
    assert (labels["orchestrate.project_id"], labels["orchestrate.foreground"]) == ("proj", "run-job")


def test_gpus_are_part_of_the_line_in_docker_s_words(tmp_path):
    nvidia = {"Runtimes": {"nvidia": {}}}
    cdi = {"DiscoveredDevices": [{"ID": "nvidia.com/gpu=0"}]}

    def flags(engine, **chosen):
        job = Job("w/s/1", ["true"], "p", tmp_path, tmp_path, gpu=True, **chosen)
        line = docker_run(run_options(job, engine, "image"), interactive=False, terminal=False)
        return [(flag, value) for flag, value in itertools.pairwise(line) if flag in ("--gpus", "--device")]

    assert flags(nvidia) == [("--gpus", "all")] and flags(nvidia, gpu_count=2) == [("--gpus", "2")]
    assert flags(nvidia, gpus=["0", "GPU-x"]) == [("--gpus", '"device=0,GPU-x"')]
    assert flags(cdi, gpus=["0"]) == [("--device", "nvidia.com/gpu=0")]
    assert flags(cdi, gpu_count=2) == [("--device", "nvidia.com/gpu=0"), ("--device", "nvidia.com/gpu=1")]


def test_signals_reach_the_program_each_once(commands):
    script = "for s in HUP INT USR1; do trap \"echo $s\" $s; done; trap 'echo TERM; exit 9' TERM; echo up; "
    script += "while :; do sleep 0.05; done"
    process = commands.start("launch", "--name", commands.name, "--", "bash", "-c", script, start_new_session=True)
    assert process.stdout.readline() == "up\n"
    for number in (signal.SIGHUP, signal.SIGUSR1):
        process.send_signal(number)
        assert process.stdout.readline() == f"{number.name.removeprefix('SIG')}\n"
    # As Ctrl-C does: the whole group of the terminal.
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout.readline() == "INT\n"
    process.terminate()
    assert process.stdout.readline() == "TERM\n" and process.stdout.read() == ""
    assert process.wait(60) == 9


def test_a_shell_in_a_terminal(commands):
    """Typed commands, the terminal's size and its changes, Ctrl-C, and the exit code of what was typed."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 99, 0, 0))
    process = commands.start(
        "shell", "--name", commands.name, stdin=child, stdout=child, stderr=child, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(child)
    seen = b""

    def read_until(words, meanwhile=lambda: None):
        nonlocal seen
        deadline = time.monotonic() + 60
        while words not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([parent], [], [], 0.5)[0]:
                seen += os.read(parent, 4096)
            else:
                meanwhile()
        seen = seen.partition(words)[2]

    try:
        commands.container()
        os.write(parent, b"until stty size | grep '33 99'; do sleep 0.1; done; test -t 1 && echo term''inal\n")
        read_until(b"\n33 99")
        read_until(b"terminal")
        fcntl.ioctl(parent, termios.TIOCSWINSZ, struct.pack("HHHH", 44, 111, 0, 0))
        os.write(parent, b"until stty size | grep '44 111'; do sleep 0.1; done\n")
        # Docker hears of a change only a moment after it has set the first size.
        read_until(b"\n44 111", lambda: process.send_signal(signal.SIGWINCH))
        os.write(parent, b"sleep 600 || echo inter''rupted\n")
        read_until(b"inter''rupted")
        until(lambda: "sleep 600" in str(commands.container().top()["Processes"]))
        os.write(parent, b"\x03")
        os.write(parent, b"echo still'' here; exit 7\n")
        read_until(b"still here")
        assert process.wait(60) == 7
    finally:
        os.close(parent)


def watchers(name):
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any("container.reaper" in word for word in process.cmdline()) and name in process.cmdline():
                found.append(process)
    return found


def test_a_killed_command_leaves_no_container_and_lets_it_end_well(commands):
    script = "trap 'echo saved > /workspace/last; exit 0' TERM; echo up; while :; do sleep 0.05; done"
    env = {"HF_TOKEN": "t0ken-value"}
    process = commands.start("launch", "--name", commands.name, "--", "bash", "-c", script, env=env)
    assert process.stdout.readline() == "up\n"
    (private,) = [
        Path(each["Source"]).parent
        for each in commands.container().attrs["Mounts"]
        if each["Destination"] == SECRETS_IN_CONTAINER
    ]
    assert private.stat().st_mode & 0o777 == 0o700
    process.kill()
    until(lambda: not commands.containers())
    assert (commands.workspace / "last").read_text() == "saved\n"
    until(lambda: not private.exists() and not watchers(commands.name))


def test_when_even_the_watch_is_killed_the_next_launch_removes_what_is_left(commands):
    process = commands.start("launch", "--name", commands.name, "--", "bash", "-c", "echo up; sleep 600")
    assert process.stdout.readline() == "up\n"
    for watcher in until(lambda: watchers(commands.name)):
        watcher.kill()
    process.kill()
    process.wait(30)
    assert commands.container().status == "running"
    assert commands.run("launch", "--", "true").returncode == 0
    assert commands.containers() == []


def test_a_name_that_is_taken_is_refused_and_its_owner_goes_on(commands):
    first = commands.start("launch", "--name", commands.name, "--", "bash", "-c", "echo up; read x; exit 5", stdin=-1)
    assert first.stdout.readline() == "up\n"
    second = commands.run("launch", "--name", commands.name, "--", "true")
    assert second.returncode == 2 and f"`{commands.name}`" in second.stderr and "--name" in second.stderr
    until(lambda: len(watchers(commands.name)) == 1)
    assert commands.container().status == "running"
    assert first.communicate("go\n", timeout=60)[0] == "" and first.returncode == 5


def test_secrets_come_by_file_and_no_record_shows_them(commands):
    stored = commands.run("set", "STORED", argv=[*CLI[:-1], "secret"], text="st0red-value\n")
    assert stored.returncode == 0, stored.stderr
    env = {"HF_TOKEN": "t0ken-value", "OTHER": "0ther-value", "HTTP_PROXY": "http://me:pr0xy-value@127.0.0.1:1"}
    options = ["--name", commands.name, "--secret", "STORED", "--secret", "OTHER", "--env", "URL=x/0ther-value"]
    script = 'echo "$HF_TOKEN $STORED $OTHER $HTTP_PROXY $URL"; read x'
    shown = commands.run("launch", "--dry-run", *options, "--", "bash", "-c", script, env=env)
    # The command line that was typed is the one place that may show what the user wrote there.
    options[-1:] = ["URL"]
    env["URL"] = "x/0ther-value"
    process = commands.start("launch", *options, "--", "bash", "-c", script, env=env, stdin=subprocess.PIPE)
    assert process.stdout.readline() == f"t0ken-value st0red-value 0ther-value {env['HTTP_PROXY']} x/0ther-value\n"
    container = commands.container()
    record = json.dumps(container.client.api.inspect_container(container.id)) + shown.stdout + shown.stderr
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            record += "\n" + " ".join(each.cmdline())
    (file,) = [
        Path(each["Source"]) for each in container.attrs["Mounts"] if each["Destination"] == SECRETS_IN_CONTAINER
    ]
    assert file.stat().st_mode & 0o777 == 0o600
    for value in ("t0ken-value", "st0red-value", "0ther-value", "pr0xy-value"):
        assert value not in record
    process.communicate("go\n", timeout=60)
    until(lambda: not file.exists())


def test_an_ordinary_user_can_launch(commands, tmp_path, docker_engine):
    """With access to the socket, and to nothing else that root has."""
    engine = Path("/var/run/docker.sock")
    if os.getuid() != 0 or not engine.exists():
        pytest.skip("only root can become another user, and the engine must be here")
    uid, gid = 23_456, 23_457
    for folder in (tmp_path, *tmp_path.parents[:3]):
        if folder != Path("/tmp"):
            folder.chmod(0o755)
    for folder in (commands.workspace, commands.root, tmp_path / "home"):
        folder.mkdir(exist_ok=True)
        os.chown(folder, uid, gid)
    user = ["setpriv", f"--reuid={uid}", f"--regid={gid}", f"--groups={engine.stat().st_gid}"]
    # The interpreter may lie where only root may look.
    user += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    env = {"HOME": str(tmp_path / "home"), "HF_TOKEN": "t0ken-value", "XDG_RUNTIME_DIR": ""}
    script = "id -u; id -g; echo $HF_TOKEN; touch /workspace/made $HOME/made /opt/hf_cache/made"
    done = commands.run("launch", "--name", commands.name, "--", "bash", "-c", script, argv=[*user, *CLI], env=env)
    assert (done.returncode, done.stdout) == (0, f"{uid}\n{gid}\nt0ken-value\n"), done.stderr
    for path in (commands.workspace / "made", commands.root / "monorepo_home" / "made"):
        assert (path.stat().st_uid, path.stat().st_gid) == (uid, gid)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--entrypoint", "nope"], 2, "known entrypoints: default"),
        (["--gpus", "0"], 2, "wanted `all`, `none`"),
        (["--memory", "much"], 2, "is not a size"),
        (["--mount", "missing:/x"], 2, "does not exist"),
        (["--port", "x"], 2, "port is `x`"),
        (["--port", "80", "--network", "host"], 2, "the host's own"),
        (["--env", "NOT_SET_ANYWHERE"], 2, "is not set here"),
        (["--env", "1=2"], 2, "is not a name"),
        (["--secret", "NOT_SET_ANYWHERE"], 2, "orchestrate secret set"),
        (["--project-id", "../x"], 2, "not a plain name"),
        (["--name", "../x"], 2, "not one for a container"),
        (["--workspace", "missing"], 2, "does not exist"),
        (["--image", "127.0.0.1:9/none:1"], 2, "cannot be pulled"),
    ],
)
def test_mistakes_are_told_before_anything_starts(commands, options, code, message):
    done = commands.run("launch", *options, "--", "true")
    assert done.returncode == code and message in done.stderr and done.stdout == ""


def test_gpus_that_are_asked_for_and_not_there_are_an_error(commands, docker_engine):
    if "nvidia" in docker_engine.info()["Runtimes"]:
        pytest.skip("this engine has GPUs")
    done = commands.run("launch", "--gpus", "all", "--", "true")
    assert done.returncode == 2 and "no NVIDIA runtime" in done.stderr and "diagnose" in done.stderr
    warned = commands.run("launch", "--", "true", env={"SYGALDRY_GPU": "true"})
    assert warned.returncode == 0 and "no GPU for this container" in warned.stderr


def test_a_gpu_container_is_tried_when_asked_for(commands, docker_engine):
    if "nvidia" in docker_engine.info()["Runtimes"]:
        pytest.skip("this engine has GPUs")
    done = commands.run("diagnose", "--test", "--quiet")
    assert done.returncode == 1 and "FAIL  test" in done.stdout and "sees no GPU" in done.stdout


def test_without_an_engine_the_code_is_3(commands):
    done = commands.run("launch", "--", "true", env={"DOCKER_HOST": "unix:///nowhere.sock"})
    assert done.returncode == 3 and "no Docker Engine answers" in done.stderr


def test_help_needs_no_heavy_module():
    heavy = "docker", "ray", "torch", "temporalio", "huggingface_hub"
    code = f"import sys\nfor name in {heavy}: sys.modules[name] = None\nfrom bridge.cli.main import main\n"
    for verb in ("launch", "build", "diagnose", "sync"):
        done = subprocess.run(
            [sys.executable, "-c", f"{code}sys.exit(main(['container', '{verb}', '--help']))"], timeout=60
        )
        assert done.returncode == 0


def test_ports_are_published_on_loopback_unless_told_otherwise():
    assert _port("8080") == ("8080/tcp", ("127.0.0.1", 8080))
    assert _port("8080:80/udp") == ("80/udp", ("127.0.0.1", 8080))
    assert _port("0.0.0.0:8080:80") == ("80/tcp", ("0.0.0.0", 8080))


@pytest.mark.parametrize("given", [["--entrypoint", "run-job"], ["-e", "run-job"], ["--entrypoint=run-job"], []])
def test_the_familiar_launcher(commands, given):
    variables = {} if given else {"SYGALDRY_ENTRYPOINT": "run-job"}
    done = commands.run(*given, "--", "echo a 'b c'; exit 4", argv=[LAUNCHER], env=variables)
    assert (done.returncode, done.stdout) == (4, "a b c\n"), done.stderr
    assert shlex.split(commands.run("echo", "-e", "x", argv=[LAUNCHER]).stdout) in ([["-e", "x"], ["x"]])
    assert commands.run(*given, "-e", argv=[LAUNCHER]).returncode == 2


def wheel(folder, name, version, requires=()):
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name.replace('-', '_')}.py", f"version = '{version}'\n")
        lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {r}" for r in requires)]
        archive.writestr(f"{stem}.dist-info/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.fixture
def repository(commands, ray_image):
    """A repository that needs a helper of torch's, wheels beside it, and a view that has a torch of its own."""
    wheels = commands.workspace / "wheels"
    wheels.mkdir()
    wheel(wheels, "torch", "9.9.0", ["nvidia-cudnn-cu12"])
    wheel(wheels, "nvidia-cudnn-cu12", "9.1.0")
    wheel(wheels, "helper", "1.0", ["torch>=2", "nvidia-cudnn-cu12"])
    (commands.workspace / "requirements.txt").write_text("--no-index\n--find-links wheels\nhelper\ntorch>=2.5\n")
    # As Spack makes them: a view is an environment over an interpreter that lies elsewhere.
    view = commands.root / "spack_store/views/standin"
    packages = view / "lib/python3.11/site-packages"
    (packages / "torch-2.9.0.dist-info").mkdir(parents=True)
    (packages / "torch-2.9.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.0\n")
    (packages / "torch.py").write_text("version = 'of the view'\n")
    (view / "bin").mkdir()
    (view / "bin/python3").symlink_to("/usr/bin/python3")
    (view / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    commands.env["SYGALDRY_IMAGE"] = ray_image
    commands.env["UV_OFFLINE"] = "1"
    return commands


def test_a_repository_runs_over_the_view_and_never_gets_a_torch_of_its_own(repository):
    def verb(name, *words):
        return repository.run(name, "--environment", "standin", *words)

    show = ["python", "-c", "import helper, torch; print(helper.version, torch.version)"]
    first = verb("run", "--", *show)
    assert (first.returncode, first.stdout) == (0, "1.0 of the view\n"), first.stderr
    assert "left out `nvidia-cudnn-cu12`" in first.stderr and "synced" in first.stderr
    again = verb("run", "--", "bash", "-c", "exit 6")
    assert (again.returncode, again.stderr) == (6, "")

    # Somebody installs over the view: the environment is refused until it is put right.
    forced = verb("run", "--", "uv", "pip", "install", "-q", "--no-index", "--find-links", "wheels", "torch")
    assert forced.returncode == 0, forced.stderr
    hidden = verb("run", "--", *show)
    assert hidden.returncode == 1 and "`nvidia-cudnn-cu12`, `torch`" in hidden.stderr
    assert "hide the view's own" in hidden.stderr and "container sync" in hidden.stderr
    assert verb("sync").returncode == 0 and verb("run", "--", *show).stdout == "1.0 of the view\n"

    # A version that the view does not have is no reason to install one.
    (repository.workspace / "wanted.txt").write_text("--no-index\n--find-links wheels\ntorch>=3\n")
    unfit = verb("sync", "--requirements", "wanted.txt")
    assert unfit.returncode == 1 and "wants torch>=3, the view has 2.9.0" in unfit.stderr
    assert verb("run", "--", "true").returncode == 1

    # The same from a lock, which names every wheel of torch's.
    (repository.workspace / "pyproject.toml").write_text(
        '[project]\nname = "mine"\nversion = "0.1"\nrequires-python = ">=3.11"\ndependencies = ["helper"]\n'
        '[tool.uv]\nno-index = true\nfind-links = ["wheels"]\n'
    )
    assert repository.run("shell", "--", "uv", "lock", "-q").returncode == 0
    locked = verb("sync")
    assert locked.returncode == 0 and "left out `torch`" in locked.stderr and "uv.lock" in locked.stderr, locked.stderr
    assert verb("run", "--", *show).stdout == "1.0 of the view\n"


def test_verify_gpu_keeps_its_exit_code_and_its_report(commands, ray_image, docker_engine, tmp_path):
    if "nvidia" in docker_engine.info()["Runtimes"]:
        pytest.skip("this engine has GPUs")
    done = commands.run("verify-gpu", "--json", "--report", tmp_path / "gpu.json", "--image", ray_image)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is False and report["problems"]
    assert json.loads((tmp_path / "gpu.json").read_text()) == report


def test_an_image_is_built_once_and_listed(commands, ray_image, base_image):
    given = ["--tag", "sygaldry-test/ray:slim", "--base", base_image, "--target", "slim", "--spack", "none"]
    built = commands.run("build", *given, "--json")
    assert built.returncode == 0 and built.stderr == "", built.stderr
    image = json.loads(built.stdout)
    assert ray_image in image["names"] and image["labels"]["ray_version"] and image["content_hash"]
    listed = json.loads(commands.run("images", "--json").stdout)
    assert image["id"] in [each["id"] for each in listed]
    table = commands.run("images").stdout
    assert ray_image in table and image["content_hash"][:16] in table and "Ray" in table
    wrong = commands.run("build", "--spack", "./missing")
    assert wrong.returncode == 2 and "is not a folder" in wrong.stderr


def test_the_standard_image_is_kept_up_to_date_and_others_are_taken_as_they_are(docker_engine, ray_image, base_image):
    spec = ImageSpec(name="sygaldry-test/ray:slim", base=base_image, target="slim", spack="")
    said = []
    assert ray_image in standard_image(docker_engine, spec.name, said.append, spec).tags and said == []
    # As when its inputs have changed: the name stands for an older image of the same choices.
    other = f"sygaldry-test/older:{uuid.uuid4().hex[:8]}"
    older, _ = docker_engine.images.build(
        fileobj=io.BytesIO(f"FROM {ray_image}\nLABEL sygaldry.content_hash=0\n".encode()), tag=other, rm=True
    )
    try:
        older.tag(spec.name, force=True)
        assert ray_image in standard_image(docker_engine, spec.name, said.append, spec).tags
        assert docker_engine.images.get(spec.name).id != older.id
        older.tag(spec.name, force=True)
        kept = standard_image(docker_engine, spec.name, said.append, replace(spec, environment="other"))
        assert kept.id == older.id and said == []
    finally:
        docker_engine.images.get(ray_image).tag(spec.name, force=True)
        docker_engine.images.remove(other)
