"""A cluster by Ray's own launcher: over ssh into containers, steps on it from outside, nothing left afterwards."""

import contextlib
import json
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.cluster_file import ClusterFileError, read_cluster_file
from cluster.token_file import TokenError, check_token, ensure_token

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
FILES = ("ray-cluster.yaml", "cluster/aws.yaml", "cluster/gcp.yaml")
UP = """\
orchestrate cluster check          # ssh, Docker, image, versions, ports, token: what is missing, and where
orchestrate cluster up --yes       # from now on, steps that ask for resources go there
orchestrate cluster nodes          # type, state, image, resources and labels of every node
orchestrate cluster status         # health; exit code 3 when a machine is missing
"""
DOWN = """\
orchestrate cluster down --yes     # containers, processes and files, on every machine
"""
CRD_VARIABLE = "KUBERAY_CRD"
"""Environment variable: path of KubeRay's `ray.io_rayclusters.yaml`, which no package index offers."""


@pytest.mark.parametrize("name", FILES)
def test_cluster_files_are_valid_and_guarded(name: str) -> None:
    found = read_cluster_file(ROOT / name)
    types = found.content["available_node_types"]
    assert {key: types[key]["labels"]["node-type"] for key in types} == {key: key for key in ("head", "gpu", "cpu")}
    options = found.content["docker"]["run_options"]
    assert {"--env=RAY_AUTH_MODE=token", "--env=RAY_AUTH_TOKEN_PATH=/ray-token/auth_token"} <= set(options)
    assert f"--label=orchestrate.cluster={found.name}" in options
    assert found.token_file is not None
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        start = found.content[commands][-1]
        assert start.startswith('[ "$(stat -c %a "$RAY_AUTH_TOKEN_PATH")" = 600 ]')
        assert '--labels="image=$SYGALDRY_IMAGE_LABEL"' in start
    assert "--dashboard-host=127.0.0.1" in found.content["head_start_ray_commands"][-1]
    import ray

    assert f'"ray, version {ray.__version__}"' in found.content["setup_commands"][0]


def test_the_readme_shows_what_is_run_here() -> None:
    readme = (ROOT / "README.md").read_text()
    for commands in (UP, DOWN):
        assert f"```sh\n{commands}```\n" in readme


def test_clouds_differ_from_our_own_machines_only_where_they_must() -> None:
    shared = ("file_mounts", "rsync_exclude", "setup_commands", "cluster_synced_files")
    ours, *others = (yaml.safe_load((ROOT / name).read_text()) for name in FILES)
    for other in others:
        assert {key: other[key] for key in shared} == {key: ours[key] for key in shared}
        assert other["docker"]["run_options"] == ours["docker"]["run_options"]


def test_where_machines_are_rented_one_with_a_gpu_is_there_from_the_start() -> None:
    """What no node that is there can give fails at once: without it no step could ask for a GPU."""
    for name in FILES[1:]:
        assert yaml.safe_load((ROOT / name).read_text())["available_node_types"]["gpu"]["min_workers"] == 1
    groups = yaml.safe_load((ROOT / "cluster/kuberay.yaml").read_text())["spec"]["workerGroupSpecs"]
    (gpu,) = [group for group in groups if group["groupName"] == "gpu"]
    assert gpu["minReplicas"] == gpu["replicas"] == 1


def test_what_is_no_cluster_file_is_refused_with_every_problem(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("cluster_name: 3\nprovider: {type: local}\nnonsense: 1\n")
    with pytest.raises(ClusterFileError) as refused:
        read_cluster_file(path)
    assert "cluster_name: 3 is not of type 'string'" in str(refused.value)
    assert "'nonsense' was unexpected" in str(refused.value)


def test_the_kubernetes_file_fits_the_operator() -> None:
    found = yaml.safe_load((ROOT / "cluster/kuberay.yaml").read_text())
    assert found["spec"]["authOptions"]["mode"] == "token"
    groups = [found["spec"]["headGroupSpec"], *found["spec"]["workerGroupSpecs"]]
    assert [group["labels"]["node-type"] for group in groups] == ["head", "gpu", "cpu"]
    if not (path := os.environ.get(CRD_VARIABLE)):
        pytest.skip(f"{CRD_VARIABLE} does not name KubeRay's definition of RayCluster, the schema is not checked")
    versions = yaml.safe_load(Path(path).read_text())["spec"]["versions"]
    version = found["apiVersion"].partition("/")[2]
    schema = next(one for one in versions if one["name"] == version)["schema"]["openAPIV3Schema"]
    jsonschema.Draft7Validator(closed(schema)).validate(found)


def closed(schema: Any) -> Any:
    """Kubernetes drops a field it does not know without a word; here it is an error."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {name: closed(part) for name, part in schema.items()}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource")
    if isinstance(schema.get("properties"), dict) and schema["properties"].keys() - {"metadata"} and not is_open:
        parts.setdefault("additionalProperties", False)
    return parts


def test_a_token_is_made_once_and_refused_when_others_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "auth_token"
    assert ensure_token(path)
    content = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(content) == 64
    assert not ensure_token(path)
    assert path.read_text() == content
    path.chmod(0o644)
    with pytest.raises(TokenError, match=r"mode `0644`.*wanted `0600`"):
        check_token(path)
    path.chmod(0o600)
    path.write_text("short")
    with pytest.raises(TokenError, match="less than"):
        check_token(path)


class Machines:
    """Two machines: addresses of loopback with an ssh server each, in front of this machine's Docker Engine."""

    def __init__(self, folder: Path, image: str) -> None:
        network = f"127.0.{random.randint(2, 250)}"
        self.folder = folder
        self.image = image
        self.head, self.worker, self.nobody = (f"{network}.{number}" for number in (21, 22, 23))
        self.name = f"test-{random.randrange(16**8):08x}"
        self.home = folder / "home"
        self.key = folder / "key"
        self.file = folder / "ray-cluster.yaml"
        self.ports = [free_port() for _ in range(5)]
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "ORCHESTRATE_"))},
            "ORCHESTRATE_HOME": str(self.home),
        }
        self._servers: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for name in ("host_key", "key"):
            argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name]
            subprocess.run(argv, check=True, timeout=30)
        shutil.copy(self.folder / "key.pub", self.folder / "authorized_keys")
        Path("/run/sshd").mkdir(exist_ok=True)
        for number, address in enumerate((self.head, self.worker)):
            settings = {
                "ListenAddress": f"{address}:22",
                "HostKey": self.folder / "host_key",
                "AuthorizedKeysFile": self.folder / "authorized_keys",
                "PidFile": "none",
                "StrictModes": "no",
                "UsePAM": "no",
                "PasswordAuthentication": "no",
                # Two machines of one engine: their containers need names of their own.
                "SetEnv": f"MACHINE={self.name}-{number}",
            }
            path = self.folder / f"sshd-{number}"
            path.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
            with (self.folder / "sshd.log").open("ab") as log:
                argv = [str(shutil.which("sshd", path="/usr/sbin")), "-D", "-e", "-f", str(path)]
                self._servers.append(subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True))
        deadline = time.monotonic() + 30
        for address in (self.head, self.worker):
            while True:
                with contextlib.suppress(OSError), socket.create_connection((address, 22), timeout=1):
                    break
                log_text = (self.folder / "sshd.log").read_text()
                assert time.monotonic() < deadline and all(one.poll() is None for one in self._servers), log_text
                time.sleep(0.05)

    def stop(self) -> None:
        for server in self._servers:
            server.terminate()
            server.wait(10)

    def write(self, **changes: Any) -> Path:
        """Our cluster file, edited as its users do; `changes` are further ones."""
        content = yaml.safe_load((ROOT / "ray-cluster.yaml").read_text())
        content["cluster_name"] = self.name
        content["auth"] = {"ssh_user": "root", "ssh_private_key": str(self.key)}
        types = content["available_node_types"]
        types["head"]["node_config"]["ips"] = [self.head]
        types["gpu"]["node_config"]["ips"] = [self.worker]
        # Logical GPUs: Ray counts them, nobody looks for them.
        types["gpu"]["resources"] = {"CPU": 2, "GPU": 2}
        docker = content["docker"]
        docker |= {"image": self.image, "container_name": "$MACHINE"}
        docker["run_options"] = [
            *(option.replace("cluster=sygaldry", f"cluster={self.name}") for option in docker["run_options"]),
            "--shm-size=300m",
        ]
        content["file_mounts"]["/ray-token"] = str(self.folder / "token")
        gcs, client, dashboard, agent, other_agent = self.ports
        for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
            start = content[commands][-1]
            for old, new in (("6379", gcs), ("=10001", f"={client}"), ("=8265", f"={dashboard}")):
                start = start.replace(old, str(new))
            listen = agent if commands.startswith("head") else other_agent
            content[commands][-1] = f"{start} --dashboard-agent-listen-port={listen} --object-store-memory=100000000"
        content |= changes
        self.file.write_text(yaml.safe_dump(content, sort_keys=False))
        return self.file

    @property
    def token(self) -> Path:
        return self.folder / "token" / "auth_token"

    @property
    def address(self) -> str:
        return f"ray://{self.head}:{self.ports[1]}"

    def run(self, *argv: Any, timeout_s: float = 600, **environment: str) -> "subprocess.CompletedProcess[str]":
        """One of our programs, at the top of the project."""
        program, *arguments = map(str, argv)
        return subprocess.run(
            [str(BIN / program), *arguments],
            env={**self.environment, **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
            check=False,
        )

    def run_as_shown(self, commands: str) -> None:
        """Commands of the README, in the folder of the cluster file."""
        path = f"{BIN}{os.pathsep}{self.environment['PATH']}"
        done = subprocess.run(
            ["bash", "-e", "-u", "-c", commands],
            env={**self.environment, "PATH": path},
            cwd=self.folder,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def containers(self) -> list[str]:
        argv = ["docker", "ps", "--all", "--quiet", "--filter", f"label=orchestrate.cluster={self.name}"]
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout.split()


def free_port() -> int:
    """One below those that Ray gives to its workers."""
    while True:
        port = random.randint(6400, 9999)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


@pytest.fixture(scope="module")
def machines(ray_image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    if os.getuid() != 0:
        pytest.skip("only root can start ssh servers for root")
    for program in ("sshd", "ssh", "ssh-keygen", "rsync"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            pytest.skip(f"there is no program `{program}`")
    machines = Machines(tmp_path_factory.mktemp("machines"), ray_image)
    (machines.folder / "plan").mkdir()
    machines.start()
    yield machines
    if machines.containers():
        machines.run("orchestrate", "cluster", "down", "--yes", "--config", machines.file)
    machines.run("orchestrate", "down")
    machines.stop()
    assert not machines.containers()


@pytest.mark.docker
def test_all_that_is_missing_is_told_with_the_machine_where_it_is(machines: Machines) -> None:
    file = machines.write()
    content = yaml.safe_load(file.read_text())
    content["available_node_types"]["cpu"]["node_config"]["ips"] = [machines.nobody]
    content["docker"]["head_image"] = "sygaldry-test/nowhere:1"
    file.write_text(yaml.safe_dump(content))
    client, dashboard = machines.ports[1:3]
    with socket.create_server((machines.head, client)), socket.create_server(("127.0.0.1", dashboard)):
        done = machines.run("orchestrate", "cluster", "up", "--yes", "--config", file)
    assert done.returncode == 3, done.stderr
    assert f"made token {machines.token}" in done.stderr
    assert f"{machines.head}: image: `sygaldry-test/nowhere:1` is not there" in done.stderr
    assert f"{machines.head}: ports: taken: {client}, {dashboard}" in done.stderr
    assert f"{machines.nobody}: login: `ssh root@{machines.nobody}`: no login" in done.stderr
    assert machines.worker not in done.stderr
    assert done.stderr.count("hint:") == 3
    listed = json.loads(machines.run("orchestrate", "cluster", "check", "--json", "--config", file).stdout)
    assert {(one["machine"], one["name"]) for one in listed if not one["passed"]} == {
        (machines.head, "image"),
        (machines.nobody, "login"),
    }
    assert not machines.containers()


@pytest.mark.docker
@pytest.mark.parametrize("mode", [0o644, None])
def test_plain_ray_up_refuses_a_missing_or_open_token(machines: Machines, mode: int | None) -> None:
    file = machines.write()
    if mode is None:
        machines.token.unlink(missing_ok=True)
    else:
        ensure_token(machines.token)
        machines.token.chmod(mode)
    done = machines.run("ray", "up", "--yes", "--no-config-cache", file)
    assert done.returncode != 0
    assert str(machines.token) in done.stdout + done.stderr
    assert not machines.containers()
    if mode is not None:
        machines.token.chmod(0o600)


PLAN = """
params: {image: {}}

steps:
  - id: gpu
    type: command
    command: sh
    args: [-c, 'cat data.txt; echo "gpus $CUDA_VISIBLE_DEVICES"']
    resources: {cpus: 0.5, gpus: 2, labels: {node-type: gpu}}
  - id: part
    type: python
    python: {call: "work:where"}
    resources: {cpus: 0.5, gpus: 0.5}
  - id: head
    type: python
    python: {call: "work:where"}
    resources: {cpus: 0.5, labels: {node-type: head}}
  - id: image
    type: python
    python: {call: "work:where"}
    image: "${{ params.image }}"
    resources: {cpus: 0.5}
  - id: never
    type: command
    command: "true"
    resources: {gpus: 3}
    allow_failure: true
"""
WORK = """
import os

def where():
    print("in a container" if os.path.exists("/.dockerenv") else "outside")
    return {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
"""


@pytest.mark.docker
@pytest.mark.ray
@pytest.mark.temporal
@pytest.mark.timeout(1500)
def test_ray_up_then_steps_from_outside_then_down(machines: Machines) -> None:
    ensure_token(machines.token)
    file = machines.write()
    done = machines.run("ray", "up", "--yes", "--no-config-cache", "--log-style=pretty", file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert machines.containers()

    machines.run_as_shown(UP)
    found = json.loads(machines.run("orchestrate", "cluster", "status", "--json").stdout)
    assert (found["state"], found["address"], found["missing"]) == ("up", machines.address, [])
    listed = json.loads(machines.run("orchestrate", "cluster", "nodes", "--json").stdout)
    assert {node["address"]: node["type"] for node in listed if node["alive"]} == {
        machines.head: "head",
        machines.worker: "gpu",
    }
    assert {node["image"] for node in listed} == {image_label_of(machines.image)}

    refused_without_the_token(machines)
    steps_run_there(machines)

    machines.run_as_shown(DOWN)
    assert not machines.containers()
    assert not Path(f"/tmp/ray_tmp_mount/{machines.name}").exists()
    status = json.loads(machines.run("orchestrate", "status", "--json").stdout)
    assert status["ray"] == {"address": None, "dashboard": None}


def image_label_of(image: str) -> str:
    argv = ["docker", "image", "inspect", "--format", "{{json .Config.Env}}", image]
    pairs = json.loads(subprocess.run(argv, capture_output=True, check=True, timeout=60).stdout)
    return next(pair.partition("=")[2] for pair in pairs if pair.startswith("SYGALDRY_IMAGE_LABEL="))


def refused_without_the_token(machines: Machines) -> None:
    wrong = machines.folder / "wrong" / "auth_token"
    ensure_token(wrong)
    environment = {**machines.environment, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "cluster.nodes", machines.address]
    for token in (str(wrong), ""):
        done = subprocess.run([*argv, token], env=environment, capture_output=True, timeout=120, check=True)
        assert "refuses" in json.loads(done.stdout)["error"], done.stdout


def steps_run_there(machines: Machines) -> None:
    folder = machines.folder / "plan"
    (folder / "plan.yaml").write_text(PLAN)
    (folder / "work.py").write_text(WORK)
    # The machines do not share this folder: it is sent there.
    (folder / "data.txt").write_text("sent\n")
    done = machines.run("orchestrate", folder / "plan.yaml", "--json", "-p", f"image={machines.image}")
    steps = {step["id"]: step for step in json.loads(done.stdout)["steps"]}
    assert done.returncode == 0, done.stdout
    assert steps["gpu"]["stdout_tail"] == "sent\ngpus 0,1\n"
    assert steps["gpu"]["gpus"] == ["0", "1"]
    assert {steps[name]["stdout_tail"] for name in ("part", "head", "image")} == {"in a container\n"}
    assert len(steps["part"]["gpus"]) == 1 and steps["head"]["gpus"] == []
    # The nodes run in the image already.
    assert steps["image"]["image"] == f"{machines.image}@{image_label_of(machines.image)}"
    assert (steps["never"]["outcome"], steps["never"]["reason"]) == ("failed", "infeasible")
    status = json.loads(machines.run("orchestrate", "status", "--json").stdout)
    assert status["ray"] == {"address": machines.address, "dashboard": None, "cluster": machines.name}
