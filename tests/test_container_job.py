"""`container_job` and the standard launch, on a real engine."""

import json
import os
import subprocess
import threading
import time
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from container import step_containers
from container.launch import Job, LaunchError, attach_or_start, entrypoint_names, remove, run_options
from container.mounts import Mount, container_root, parse_mounts
from steps import StepCancelled, StepError, StepFailed
from steps.container_job import Params, run

pytestmark = pytest.mark.docker


@pytest.fixture
def job_context(tmp_path, step_context):
    """A context whose project caches are in the test's folder, with a key of its own."""
    flow = uuid.uuid4().hex

    def make(env=None, secrets=None, attempt=1):
        own = {"SYGALDRY_CONTAINER_ROOT": str(tmp_path / "root")}
        context = step_context(env=own, secrets=secrets, key=f"{flow}/run/step/{attempt}")
        context.env.update(env or {})
        context.declared_env = dict(env or {})
        return context

    return make


@pytest.fixture
def containers_of(docker_engine):
    """Containers of a context's step; what is left at the end is removed."""
    asked = []

    def find(context):
        label = f"orchestrate.step_key={context.key.rpartition('/')[0]}"
        asked.append(label)
        return docker_engine.containers.list(all=True, filters={"label": label})

    yield find
    for label in asked:
        for container in docker_engine.containers.list(all=True, filters={"label": label}):
            remove(docker_engine, container.name)


@pytest.fixture
def in_background():
    """Runs a step in a thread; the returned list gets its outputs or its error."""
    threads = []

    def start(params, context):
        ended = []

        def work():
            try:
                ended.append(run(params, context))
            except BaseException as error:
                ended.append(error)

        threads.append(threading.Thread(target=work))
        threads[-1].start()
        return ended, threads[-1]

    yield start
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def job(**changes):
    values = {"key": "w/r/s/1", "command": ["bash", "-c", "true"], "project_id": "p", **changes}
    return Job(**values)


@pytest.mark.parametrize("entrypoint", ["run-job", "run-job.sh", "default", "default.sh"])
def test_runs_the_command_line_and_removes_the_container(
    small_image, docker_engine, job_context, containers_of, entrypoint
):
    context = job_context()
    outputs = run(
        Params(command="printf '%s\\n' a 'b c' \"$PWD\"; echo no >&2", image=small_image, entrypoint=entrypoint),
        context,
    )
    assert context.text() == "a\nb c\n/workspace" and context.text("stderr") == "no"
    assert outputs["image"] == small_image and outputs["exit_code"] == 0
    assert outputs["image_id"] == docker_engine.images.get(small_image).id
    assert containers_of(context) == []


def test_the_exit_code_is_kept(small_image, job_context, containers_of):
    context = job_context()
    with pytest.raises(StepFailed, match="ended with exit code 7") as caught:
        run(Params(command="echo last words >&2; exit 7", image=small_image), context)
    assert caught.value.exit_code == 7 and context.text("stderr") == "last words" and containers_of(context) == []


def test_env_and_secrets_arrive_and_the_engine_does_not_know_the_secrets(
    small_image, job_context, containers_of, in_background, docker_engine
):
    values = {"TOKEN": "t0ken-value", "LINES": "one\ntwo '\"$HOME"}
    context = job_context(
        env={
            "HF_TOKEN": values["TOKEN"],
            "PLAN": "from plan",
            "URL": f"http://{values['TOKEN']}@host",
            "L": values["LINES"],
        },
        secrets=values,
    )
    context.env["WORKER_ONLY"] = "seen"
    ended, thread = in_background(
        Params(
            command='echo "$HF_TOKEN|$PLAN|$BLOCK|$URL|${WORKER_ONLY-no}|$SYGALDRY_IN_CONTAINER"; echo "$L"; cat gate',
            image=small_image,
            env={"BLOCK": "from block"},
        ),
        context,
    )
    os.mkfifo(context.plan_dir / "gate")
    context.wait_for_line("one")
    (container,) = containers_of(context)
    record = json.dumps(docker_engine.api.inspect_container(container.id))
    processes = json.dumps(container.top(ps_args="-eo pid,args"))
    (context.plan_dir / "gate").write_text("")
    thread.join(20)
    assert isinstance(ended[0], dict), ended
    assert context.text() == ("t0ken-value|from plan|from block|http://t0ken-value@host|no|1\n" + values["LINES"])
    assert "t0ken-value" not in record + processes and "from plan" in record


def test_an_address_with_a_login_arrives_and_the_engine_does_not_know_it(
    small_image, job_context, containers_of, in_background, docker_engine
):
    context = job_context(env={"INDEX": "https://me:open-sesame@index/simple"})
    context.env |= {"HTTPS_PROXY": "http://me:open-sesame@proxy:1", "HTTP_PROXY": "http://open.proxy:1"}
    os.mkfifo(context.plan_dir / "gate")
    ended, thread = in_background(
        Params(
            command='echo "$HTTPS_PROXY $HTTP_PROXY $INDEX $BLOCK"; cat gate',
            image=small_image,
            env={"BLOCK": "ftp://me:open-sesame@block"},
        ),
        context,
    )
    context.wait_for_line("block")
    (container,) = containers_of(context)
    record = json.dumps(docker_engine.api.inspect_container(container.id))
    (context.plan_dir / "gate").write_text("")
    thread.join(20)
    assert isinstance(ended[0], dict), ended
    addresses = "http://me:open-sesame@proxy:1 http://open.proxy:1 https://me:open-sesame@index/simple"
    assert context.text() == f"{addresses} ftp://me:open-sesame@block"
    assert "open-sesame" not in record and "http://open.proxy:1" in record


def test_the_standard_mounts_are_there_and_files_are_ours(small_image, job_context, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "in").write_text("input")
    context = job_context()
    command = """
    set -e
    cat /data/in; touch /workspace/made $HOME/made /opt/spack_store/made /opt/bazel_cache/made $HF_HOME/made
    if touch /data/x /opt/sygaldry/entrypoints/x /etc/passwd.x 2>/dev/null; then echo WRITABLE; fi
    id -u; id -g; hostname > /dev/null
    """
    run(Params(command=command, image=small_image, mounts=["data:/data:ro"], network="none"), context)
    root = tmp_path / "root"
    assert context.text() == f"input{os.getuid()}\n{os.getgid()}"
    for folder in ("monorepo_home", "spack_store", "bazel_cache", "hf_cache"):
        assert (root / folder / "made").stat().st_uid == os.getuid()
    assert (tmp_path / "made").exists() and (root / "config").is_dir() and (root / "logs").is_dir()


def test_outputs_written_in_the_container_reach_the_step(small_image, job_context, tmp_path):
    file = tmp_path / "outputs.jsonl"
    context = job_context()
    context.env["STEP_OUTPUTS"] = str(file)
    run(Params(command="""echo '{"score": 1}' >> $STEP_OUTPUTS""", image=small_image), context)
    assert json.loads(file.read_text()) == {"score": 1}


def test_limits_are_set(small_image, job_context, containers_of, in_background):
    context = job_context()
    _, _ = in_background(
        Params(command="echo up; sleep 600", image=small_image, memory="64MiB", cpus=0.5, network="none"), context
    )
    context.wait_for_line("up")
    (container,) = containers_of(context)
    settings = container.attrs["HostConfig"]
    assert (settings["Memory"], settings["NanoCpus"], settings["NetworkMode"]) == (64 << 20, 500_000_000, "none")
    assert settings["Init"] is True and container.labels["orchestrate.attempt"] == "1"
    context.cancel()


def test_cancel_stops_the_job_keeps_its_last_words_and_removes_it(
    small_image, job_context, containers_of, in_background
):
    context = job_context()
    command = "trap 'echo saved; exit 0' TERM; echo up; while true; do sleep 0.05; done"
    ended, thread = in_background(Params(command=command, image=small_image), context)
    context.wait_for_line("up")
    context.cancel()
    thread.join(20)
    assert isinstance(ended[0], StepCancelled) and context.text() == "up\nsaved" and containers_of(context) == []


def test_a_job_that_ignores_the_signal_is_killed_after_the_grace_period(
    small_image, job_context, containers_of, in_background
):
    context = job_context()
    ended, thread = in_background(Params(command="trap '' TERM; echo up; sleep 600", image=small_image), context)
    context.wait_for_line("up")
    context.cancel()
    thread.join(20)
    assert isinstance(ended[0], StepCancelled) and containers_of(context) == []


def test_the_same_key_attaches_without_a_gap_or_a_repeat(
    small_image, job_context, containers_of, in_background, docker_engine, tmp_path
):
    """A first process starts the job and is killed; a second run of the same key sees the rest."""
    context = job_context()
    program = """
import sys, os, json
from pathlib import Path
from steps.container_job import Params, run
class Context:
    attempt, gpus, grace_s, secrets, declared_env, cancelled = 1, (), 1.0, {}, {}, False
    key, folder, image, root = sys.argv[1:]
    plan_dir = working_dir = Path(folder); attempt_dir = Path(folder) / "attempt-1"
    env = {"SYGALDRY_CONTAINER_ROOT": root}
    def on_cancel(self, callback): pass
    def check_cancelled(self): pass
    def heartbeat(self, progress): pass
    def log(self, message, stream="stdout"): print(message, flush=True)
run(Params(command=sys.stdin.read(), image=Context.image), Context())
"""
    command = "for i in $(seq 20000); do echo line $i; done; read -t 60 x < gate; echo line end; printf unfinished"
    os.mkfifo(tmp_path / "gate")
    with subprocess.Popen(
        [os.sys.executable, "-c", program, context.key, tmp_path, small_image, tmp_path / "root"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as first:
        first.stdin.write(command)
        first.stdin.close()
        seen = [first.stdout.readline().rstrip("\n") for _ in range(7000)]
        first.kill()
        seen += first.stdout.read().split("\n")
    seen = [line for line in seen if line]
    (container,) = containers_of(context)
    assert container.status == "running"
    ended, thread = in_background(Params(command=command, image=small_image), context)
    (tmp_path / "gate").write_text("go\n")
    thread.join(30)
    assert isinstance(ended[0], dict), ended
    attached, *rest = [line for _, line in context.lines]
    assert attached.startswith("attached to container") and ended[0]["container"] == container.name
    # A line that was printed but not yet counted when the process died is the one that may come twice.
    if rest[0] == seen[-1]:
        rest = rest[1:]
    assert seen + rest == [*(f"line {number}" for number in range(1, 20001)), "line end", "unfinished"]


def test_a_job_that_ended_meanwhile_gives_its_result(small_image, job_context, docker_engine, tmp_path):
    context = job_context()
    started = attach_or_start(
        docker_engine,
        job(
            key=context.key,
            image=small_image,
            root=tmp_path / "root",
            workspace=tmp_path,
            command=["bash", "-c", "echo hi; exit 3"],
        ),
        print,
    )
    started.wait(timeout=20)
    with pytest.raises(StepFailed, match="exit code 3"):
        run(Params(command="echo never", image=small_image), context)
    assert context.lines[1:] == [("stdout", "hi")]


def test_what_an_earlier_attempt_left_is_removed_first(
    small_image, job_context, docker_engine, containers_of, tmp_path
):
    first, second = job_context(attempt=1), job_context(attempt=2)
    left = attach_or_start(
        docker_engine,
        job(key=first.key, image=small_image, root=tmp_path / "root", workspace=tmp_path, command=["sleep", "600"]),
        print,
    )
    run(Params(command="true", image=small_image), second)
    assert containers_of(first) == [] and left.name != second.key


def test_containers_of_a_state_directory_end_without_the_process_that_attends_to_them(
    small_image, job_context, containers_of, in_background, tmp_path
):
    contexts = [job_context(), job_context(attempt=2)]
    contexts[1].key = f"{contexts[0].key.split('/')[0]}/run/other/1"
    command = "trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done"
    ended = []
    for number, context in enumerate(contexts):
        context.env |= {"ORCHESTRATE_STATE_DIR": str(tmp_path / f"state-{number}"), "HF_TOKEN": "t0ken"}
        ended.append(in_background(Params(command=command, image=small_image), context))
        context.wait_for_line("up")
    value = step_containers.state_digest(str(tmp_path / "state-0"))
    (found,) = step_containers.find(step_containers.STATE_LABEL, value, os.environ)
    assert found.pid and found.secrets.exists()
    assert step_containers.end([found], os.environ, 5.0) == []
    assert not found.secrets.exists() and containers_of(contexts[0]) == []
    (left,) = containers_of(contexts[1])
    assert left.status == "running" and left.name != found.name
    assert step_containers.find(step_containers.STATE_LABEL, value, {"DOCKER_HOST": "unix:///no/such"}) == []
    contexts[1].cancel()


def test_lines_without_end_and_broken_utf8_are_survived(small_image, job_context):
    context = job_context()
    run(
        Params(command="head -c 200000 /dev/zero | tr '\\0' x; printf '\\nbad \\xff\\n\\n'", image=small_image), context
    )
    lines = [line for _, line in context.lines]
    assert "".join(lines[:-2]) == "x" * 200_000 and lines[-2:] == ["bad \ufffd", ""]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"entrypoint": "nope"}, "no entrypoint `nope`(.|\n)*known entrypoints: default, .*run-job"),
        ({"entrypoint": "_common"}, "no entrypoint `_common`"),
        ({"gpu": True}, "no NVIDIA runtime"),
        ({"memory": "much"}, "memory `much` is not a size"),
        ({"mounts": ["missing:/x"]}, "does not exist"),
        ({"project_id": "../x"}, "not a plain name"),
        ({"image": "127.0.0.1:9/none:1"}, "cannot be pulled(.|\n)*hint: build it"),
        ({"workspace": "missing"}, "is not a folder"),
    ],
)
def test_mistakes_are_final(small_image, docker_engine, job_context, containers_of, params, message):
    if params.get("gpu") and "nvidia" in docker_engine.info()["Runtimes"]:
        pytest.skip("this engine has GPUs")
    context = job_context()
    with pytest.raises(StepError, match=message) as caught:
        run(Params(**{"command": "true", "image": small_image, **params}), context)
    assert not isinstance(caught.value, StepFailed) and containers_of(context) == []


def test_an_image_without_bash_is_told(docker_engine, small_image, job_context, containers_of):
    name = f"sygaldry-test/bare:{uuid.uuid4().hex[:8]}"
    docker_engine.api.import_image_from_data(b"\0" * 1024, repository=name.split(":")[0], tag=name.split(":")[1])
    try:
        context = job_context()
        with pytest.raises(StepFailed, match=r"exit code 127(.|\n)*need bash"):
            run(Params(command="true", image=name), context)
        assert "exec bash failed" in context.text("stderr") and containers_of(context) == []
    finally:
        docker_engine.images.remove(name, force=True)


def test_an_old_launcher_gets_the_command_as_one_argument(job_context, tmp_path):
    launcher = tmp_path / "launch.sh"
    launcher.write_text('#!/bin/sh\necho "$# $1 $2 $3 [$4] $SYGALDRY_PROJECT_ID $SYGALDRY_GPU $MINE"\nexit $CODE\n')
    launcher.chmod(0o755)
    params = Params(command="echo 'a b'", launcher_path="launch.sh", project_id="proj", env={"MINE": "m", "CODE": "0"})
    context = job_context()
    assert run(params, context)["exit_code"] == 0
    assert context.text() == "4 --entrypoint run-job -- [echo 'a b'] proj false m"
    with pytest.raises(StepFailed, match="exit code 5"):
        run(params.model_copy(update={"env": {"CODE": "5"}}), job_context())


def test_a_launcher_that_is_not_there_leaves_it_to_us(small_image, job_context):
    context = job_context()
    run(Params(command="echo ours", launcher_path="./container/launch_container.sh", image=small_image), context)
    assert context.text() == "ours"


def test_our_own_launcher_is_no_other_way(small_image, job_context, tmp_path):
    (tmp_path / "container").symlink_to(Path(__file__).parent.parent / "container")
    context = job_context()
    params = Params(
        command="echo $MINE", launcher_path="container/launch_container.sh", image=small_image, env={"MINE": "1"}
    )
    assert run(params, context)["container"] and context.text() == "1"


def test_the_image_can_come_from_the_environment(small_image, job_context):
    assert run(Params(command="true"), job_context(env={"SYGALDRY_IMAGE": small_image}))["image"] == small_image


def spack(folder, activate):
    """A stand-in for a Spack checkout: the shell function is what an entrypoint meets."""
    setup = folder / "spack" / "share" / "spack" / "setup-env.sh"
    setup.parent.mkdir(parents=True)
    setup.write_text(f'spack() {{ echo "spack $*: $UNSET_BY_NOBODY"; {activate}; }}\n')


@pytest.mark.parametrize(("activate", "code"), [("export VIEW=active", 0), ("return 1", 1)])
def test_run_job_activates_the_spack_environment_of_the_folder(small_image, job_context, tmp_path, activate, code):
    spack(tmp_path, activate)
    (tmp_path / "spack.yaml").write_text("spack: {}\n")
    context = job_context(env={"SPACK_ROOT": "/workspace/spack"})
    params = Params(command="echo view=$VIEW", image=small_image)
    if code:
        with pytest.raises(StepFailed, match="exit code 1"):
            run(params, context)
        assert "cannot be activated" in context.text("stderr")
    else:
        run(params, context)
        assert context.text() == "spack env activate .: \nview=active"


def test_run_job_goes_on_without_spack(small_image, job_context, tmp_path):
    (tmp_path / "spack.yaml").write_text("spack: {}\n")
    context = job_context()
    run(Params(command="echo done", image=small_image), context)
    assert context.text() == "done" and "has no Spack" in context.text("stderr")


def test_gpus_are_asked_for_in_the_way_the_engine_knows(tmp_path):
    def requests(engine, **changes):
        options = run_options(job(root=tmp_path, workspace=tmp_path, **changes), engine, "sha256:1")
        return [dict(request) for request in options["device_requests"]]

    nvidia = {"Runtimes": {"nvidia": {}}}
    assert requests(nvidia) == []
    assert requests(nvidia, gpu=True)[0]["Count"] == -1
    assert requests(nvidia, gpus=["0", "GPU-x"])[0]["DeviceIDs"] == ["0", "GPU-x"]
    devices = {"DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=0"}]}
    assert requests(devices, gpu=True)[0]["DeviceIDs"] == ["nvidia.com/gpu=all"]
    with pytest.raises(LaunchError, match="no NVIDIA runtime"):
        requests({"Runtimes": {"runc": {}}}, gpu=True)


def test_a_mount_of_the_plan_replaces_a_standard_one(tmp_path):
    own = Mount(str(tmp_path), "/opt/hf_cache")
    options = run_options(job(root=tmp_path / "r", workspace=tmp_path, mounts=[own]), {}, "sha256:1")
    assert [each["Source"] for each in options["mounts"] if each["Target"] == "/opt/hf_cache"] == [str(tmp_path)]


def test_where_the_caches_are(tmp_path):
    assert str(container_root({"SYGALDRY_CONTAINER_ROOT": "/r"}, "p")) == "/r"
    assert str(container_root({"XDG_STATE_HOME": "/s"}, "p")) == "/s/sygaldry/p"
    assert str(container_root({"HOME": "/h"}, "p")) == "/h/.local/state/sygaldry/p"


@given(text=st.text(alphabet="a/:~row.", max_size=12))
def test_mounts_are_read_or_refused(text, tmp_path_factory):
    try:
        (mount,) = parse_mounts([text], tmp_path_factory.getbasetemp())
    except ValueError as error:
        assert text in str(error)
    else:
        assert Path(mount.host).exists() and mount.container.startswith("/")


def test_entrypoints_are_shell_scripts():
    assert {"default", "run-job"} <= set(entrypoint_names())


def test_through_the_host(small_image, run_step, tmp_path, docker_engine):
    node = {"SYGALDRY_CONTAINER_ROOT": str(tmp_path / "root"), "TOKEN": "t0ken-value"}
    result = run_step(
        "container_job",
        {"command": "echo token=$HF_TOKEN $DECLARED; echo problem >&2; exit 4", "image": small_image},
        env={"DECLARED": "yes"},
        secrets={"HF_TOKEN": "TOKEN"},
        node_env=node,
    )
    folder = tmp_path / "logs/flow/run/container_job/attempt-1"
    assert (result.outcome, result.exit_code) == ("failed", 4)
    assert (folder / "stdout.log").read_text() == "token=*** yes\n"
    assert (folder / "stderr.log").read_text() == "problem\n"


def test_a_time_limit_ends_the_container_through_the_host(small_image, run_step, tmp_path, docker_engine):
    started = time.monotonic()
    result = run_step(
        "container_job",
        {"command": "sleep 600", "image": small_image},
        node_env={"SYGALDRY_CONTAINER_ROOT": str(tmp_path / "root")},
        timeout_s=2,
    )
    assert result.outcome == "timed_out" and time.monotonic() - started < 30
    label = {"label": "orchestrate.step_key=flow/run/container_job"}
    assert docker_engine.containers.list(all=True, filters=label) == []
