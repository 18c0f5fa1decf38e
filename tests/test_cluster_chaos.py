"""Three nodes with addresses of their own, and a plan of 50 steps from outside while nodes die: nothing is lost."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bridge import services
from bridge.client import TASK_QUEUE, Client
from bridge.current_cluster import CurrentCluster, use_cluster
from bridge.plan import Plan, Step
from bridge.state import State
from bridge.temporal import connect_temporal
from cluster.nodes import Node, NodesError, list_nodes
from cluster.token_file import ensure_token

pytestmark = [pytest.mark.docker, pytest.mark.ray, pytest.mark.temporal, pytest.mark.timeout(900)]

ROOT = Path(__file__).parent.parent
PATIENCE_S = 300.0
STEPS = 50
EFFECT = '''
import os, socket, time

def note(what, name, context):
    descriptor = os.open("ledger", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.write(descriptor, f"{what} {name} {context.attempt} {socket.gethostname()}\\n".encode())
    os.close(descriptor)

def effect(name, pause_s, context):
    """Its side effect is the last thing it does."""
    note("began", name, context)
    time.sleep(pause_s)
    note("did", name, context)
    return {"host": socket.gethostname()}
'''


class Nodes:
    """Containers on a private network, each one Ray node in our own image."""

    def __init__(self, engine: Any, image: str, folder: Path) -> None:
        self.engine = engine
        self.image = image
        self.folder = folder
        self.name = f"chaos-{uuid.uuid4().hex[:8]}"
        self.token = folder / "token" / "auth_token"
        self.network: Any = None
        self.containers: dict[str, Any] = {}

    def start(self) -> None:
        ensure_token(self.token)
        self.network = self.engine.networks.create(
            self.name, driver="bridge", labels={"orchestrate.cluster": self.name}
        )
        # The head runs no steps.
        self._run("head", "--head --port=6379 --num-cpus=0 --ray-client-server-port=10001 --dashboard-host=127.0.0.1")
        for name in ("a", "b"):
            self._run(name, f"--address={self.head}:6379 --num-cpus=2")

    def _run(self, name: str, options: str) -> None:
        folders = [*(ROOT / package for package in ("cluster", "container", "steps"))]
        volumes = {str(path): {"bind": f"/orchestrate/{path.name}", "mode": "ro"} for path in folders}
        volumes[str(self.token.parent)] = {"bind": "/ray-token", "mode": "ro"}
        volumes[str(self.folder / "plan")] = {"bind": str(self.folder / "plan"), "mode": "rw"}
        command = f"exec ray start --block --node-ip-address=$(hostname -i) {options} --object-store-memory=100000000"
        self.containers[name] = self.engine.containers.run(
            self.image,
            ["bash", "-c", f"{command} --disable-usage-stats --labels=image=$SYGALDRY_IMAGE_LABEL"],
            name=f"{self.name}-{name}",
            hostname=name,
            network=self.name,
            volumes=volumes,
            environment={
                "PYTHONPATH": "/orchestrate",
                "PYTHONDONTWRITEBYTECODE": "1",
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": "/ray-token/auth_token",
                "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL": "minor",
                "RAY_worker_niceness": "0",
                "GRPC_ENABLE_FORK_SUPPORT": "0",
                # As in ray-cluster.yaml, only faster: a node that does not answer is dead after (1 s + 2 s) x 4.
                "RAY_health_check_period_ms": "1000",
                "RAY_health_check_timeout_ms": "2000",
                "RAY_health_check_failure_threshold": "4",
            },
            labels={"orchestrate.cluster": self.name},
            shm_size="200m",
            init=True,
            detach=True,
        )

    @property
    def head(self) -> str:
        head = self.containers["head"]
        head.reload()
        return str(head.attrs["NetworkSettings"]["Networks"][self.name]["IPAddress"])

    @property
    def address(self) -> str:
        return f"ray://{self.head}:10001"

    def alive(self) -> list[Node]:
        try:
            return [node for node in list_nodes(self.address, self.token) if node.alive]
        except NodesError:
            return []

    def kill_raylet(self, name: str) -> None:
        """`kill -9` of the node's main process; `ray start --block` and with it the container then end."""
        command = ["bash", "-c", 'kill -9 "$(pidof raylet)"']
        code, output = self.containers[name].exec_run(command)
        assert code == 0, output

    def start_again(self, name: str) -> None:
        container = self.containers[name]
        container.wait(timeout=PATIENCE_S)
        container.start()

    def logs(self) -> str:
        return "\n".join(f"--- {name}\n{one.logs(tail=30).decode()}" for name, one in self.containers.items())

    def remove(self) -> None:
        for container in self.containers.values():
            container.remove(force=True)
        if self.network is not None:
            self.network.remove()


@pytest.fixture
def nodes(docker_engine: Any, ray_image: str, tmp_path: Path) -> Iterator[Nodes]:
    (tmp_path / "plan").mkdir()
    nodes = Nodes(docker_engine, ray_image, tmp_path)
    try:
        nodes.start()
        yield nodes
    finally:
        nodes.remove()


@pytest.fixture
async def client(nodes: Nodes, local_state: State) -> AsyncIterator[Client]:
    """Plans of this client run their steps on the nodes, as after `orchestrate cluster up`."""
    local_state.create()
    use_cluster(local_state, CurrentCluster(nodes.name, nodes.address, str(nodes.token), ""))
    address = (await asyncio.to_thread(services.ensure, local_state)).address
    yield Client(await connect_temporal(address, None, local_state), TASK_QUEUE, local_state, local=True)


async def until(what: str, holds: Callable[[], object], nodes: Nodes) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not await asyncio.to_thread(holds):
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for: {what}\n{nodes.logs()}"
        await asyncio.sleep(0.1)


async def test_fifty_steps_while_nodes_die_and_are_cut_off(client: Client, nodes: Nodes) -> None:
    folder = nodes.folder / "plan"
    (folder / "effects.py").write_text(EFFECT)
    ledger = folder / "ledger"
    ledger.touch()
    await until("three nodes", lambda: len(nodes.alive()) == 3, nodes)

    def running_on(host: str, since: int = 0) -> bool:
        """By the lines behind the first `since`: steps that died with their node never say that they did it."""
        lines = [line.split() for line in ledger.read_text().splitlines()[since:]]
        did = {(name, attempt) for what, name, attempt, _ in lines if what == "did"}
        return any(where == host and (name, attempt) not in did for _, name, attempt, where in lines)

    steps = [
        Step.model_validate(
            {
                "id": f"s{number}",
                "type": "python",
                "params": {"call": "effects:effect", "arguments": {"name": f"s{number}", "pause_s": 2.0}},
                "resources": {"cpus": 0.5},
                "retry": {"max_attempts": 10, "backoff_s": 0.1, "on": ["infrastructure"]},
            }
        )
        for number in range(STEPS)
    ]
    run = await client.start(Plan(steps=steps), plan_dir=folder)

    await until("a step runs on a", lambda: running_on("a"), nodes)
    await asyncio.to_thread(nodes.kill_raylet, "a")
    await asyncio.to_thread(nodes.start_again, "a")
    before = len(ledger.read_text().splitlines())

    await until("a step runs on b", lambda: running_on("b"), nodes)
    await asyncio.to_thread(nodes.containers["b"].kill)
    await asyncio.to_thread(nodes.start_again, "b")

    await until("a step runs on a again", lambda: running_on("a", before), nodes)
    await asyncio.to_thread(nodes.network.disconnect, nodes.containers["a"])

    report = await asyncio.wait_for(client.wait(run.workflow_id, run.run_id), PATIENCE_S)
    assert report.outcome == "succeeded", [step for step in report.steps if step.outcome != "succeeded"]
    # The one that was cut off learns that it is given up, and ends; what ran there has come to an end too.
    await asyncio.to_thread(nodes.network.connect, nodes.containers["a"])
    await asyncio.to_thread(nodes.containers["a"].wait, timeout=PATIENCE_S)

    did = [line.split()[1:3] for line in ledger.read_text().splitlines() if line.startswith("did ")]
    retried = 0
    for step in report.steps:
        *lost, last = step.attempts
        assert last.outcome == "succeeded"
        assert {attempt.reason for attempt in lost} <= {"infrastructure"}
        retried += bool(lost)
        effects = [int(attempt) for name, attempt in did if name == step.id]
        # Once for the attempt that succeeded; one given up may have had its effect, and the report says it was tried.
        assert effects.count(last.number) == 1, (step.id, effects, step.attempts)
        assert len(effects) == len(set(effects)) <= len(step.attempts), (step.id, effects, step.attempts)
    assert retried
