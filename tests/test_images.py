"""Where actors are put into their image: which nodes are asked, which are used, what is said when none can."""

import asyncio
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.checks import NodeImage
from cluster.images import Images, ImagesUnfit, Placing
from cluster.pins import pin as pinned_at
from cluster.room import Room
from cluster.shape import ResourceShape
from container.image_label import image_label
from container.worker import WorkerSpec, worker_config
from steps import StepRequest
from steps._files import attempt_dir
from steps._secrets import run_secrets_dir

FIT = NodeImage(pinned="sha256:1", python="/usr/bin/python3", kit="/kit", host_python="/usr/bin/python3", root="/ours")
SHAPE = ResourceShape(image="torch:2", pinned="sha256:1")


class Cluster:
    """Nodes with one CPU each, and what they answer about the image."""

    def __init__(self, **answers: NodeImage | str) -> None:
        self.answers = {
            name: NodeImage(error=said) if isinstance(said, str) else said for name, said in answers.items()
        }
        self.labels: dict[str, str] = {}
        self.asked: list[str] = []
        self.images = Images(lambda: None, self._check)

    async def _check(self, node_id: str, name: str, pinned: str, gpus: bool) -> NodeImage:
        self.asked.append(node_id)
        await asyncio.sleep(0)
        return self.answers[node_id]

    @property
    def nodes(self) -> list[dict[str, Any]]:
        """As `ray.nodes()` gives them."""
        return [
            {
                "NodeID": name,
                "NodeManagerHostname": name,
                "Alive": True,
                "Resources": {"CPU": 1.0},
                "Labels": {"image": self.labels[name]} if name in self.labels else {},
            }
            for name in self.answers
        ]

    async def place(self, shape: ResourceShape = SHAPE, busy: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Where an actor may be placed; empty while nodes are being asked, and they have answered after that."""
        room = Room(self.nodes, {name: {"CPU": 0.0 if name in busy else 1.0} for name in self.answers})
        placing = self.images.placing(shape, self.nodes, room)
        await asyncio.sleep(0.01)
        return placing.node_ids if placing else ()


async def test_one_node_is_asked_and_used() -> None:
    cluster = Cluster(a=FIT, b=FIT)
    assert await cluster.place() == ()
    assert await cluster.place() == ("a",)
    assert cluster.asked == ["a"]


async def test_another_node_is_asked_when_the_first_is_busy() -> None:
    cluster = Cluster(a=FIT, b=FIT, c=FIT)
    await cluster.place()
    assert await cluster.place(busy=("a", "b")) == ("a",)
    assert await cluster.place(busy=("a", "b")) == ("a", "c")
    assert cluster.asked == ["a", "c"]


async def test_a_node_that_cannot_is_passed_over() -> None:
    cluster = Cluster(a="no engine", b=FIT)
    assert [await cluster.place() for _ in range(3)] == [(), (), ("b",)]


async def test_no_node_that_can_is_an_error_that_names_each() -> None:
    cluster = Cluster(a="no engine\n\nhint: start it", b="no such image\n\nhint: build it")
    cluster.labels["b"] = "other-image"
    await cluster.place()
    await cluster.place()
    with pytest.raises(ImagesUnfit) as caught:
        await cluster.place()
    text = str(caught.value)
    assert "image `torch:2`: `a` (label image=none): no engine; `b` (label image=other-image): no such image" in text
    assert text.endswith("hint: start it\n\nhint: build it")


async def test_a_gang_asks_as_many_nodes_as_it_needs() -> None:
    cluster = Cluster(a=FIT, b="no engine", c=FIT)
    shape = SHAPE.model_copy(update={"nodes": 2})
    assert [await cluster.place(shape) for _ in range(3)] == [(), (), ("a", "c")]
    assert cluster.asked == ["a", "b", "c"]


ELSEWHERE = FIT.model_copy(update={"root": "/elsewhere"})


async def test_nodes_where_the_image_lies_elsewhere_are_not_mixed() -> None:
    cluster = Cluster(a=FIT, b=ELSEWHERE)
    await cluster.place()
    await cluster.place(busy=("a",))
    assert await cluster.place(busy=("a",)) == ("b",), "the one that is free"
    assert await cluster.place() == ("a",)


async def test_a_gang_takes_nodes_that_are_alike() -> None:
    cluster = Cluster(a=FIT, b=ELSEWHERE, c=FIT, d=ELSEWHERE, e=ELSEWHERE)
    shape = SHAPE.model_copy(update={"nodes": 2})
    assert [await cluster.place(shape) for _ in range(3)] == [(), (), ("a", "c")]
    assert await cluster.place(shape, busy=("a",)) == ("b", "d"), "those that are free"
    larger = SHAPE.model_copy(update={"nodes": 3})
    assert [await cluster.place(larger, busy=("b",)) for _ in range(2)] == [(), ("b", "d", "e")], "those that suffice"


async def test_a_gang_that_finds_too_few_alike_is_an_error_and_waits_no_more() -> None:
    cluster = Cluster(a=FIT, b=ELSEWHERE, c="no engine")
    shape = SHAPE.model_copy(update={"nodes": 2})
    await cluster.place(shape)
    await cluster.place(shape)
    with pytest.raises(ImagesUnfit, match=r"too few nodes .*`a` .*: fit, but too few others are set up like it"):
        await cluster.place(shape)


async def test_the_name_is_looked_up_again_for_every_run() -> None:
    cluster = Cluster(a=FIT)
    shape = ResourceShape(image="torch:2")
    assert await cluster.images.pin(shape, cluster.nodes, 5) == "sha256:1"
    cluster.answers["a"] = FIT.model_copy(update={"pinned": "sha256:2"})
    assert await cluster.images.pin(shape, cluster.nodes, 5) == "sha256:2"
    assert await cluster.place() == ("a",)
    assert cluster.asked == ["a", "a"]


async def test_a_node_that_is_the_image_is_found_by_its_label() -> None:
    digest, other = "0123456789abcdef" * 4, "f" * 64
    cluster = Cluster(a=FIT, b=FIT)
    cluster.labels["b"] = label = image_label("own/torch:2", digest)
    for image, content_hash, pin in (
        ("own/torch:2", "", f"image={label}"),
        (f"own/torch:2@{digest}", "", f"image={label}"),
        ("a-second-name:1", digest, f"image={label}"),
        (label, "", f"image={label}"),
        (f"own/torch:2@{other}", "", "sha256:1"),
        ("own/torch:2", other, "sha256:1"),
        ("torch:2", "", "sha256:1"),
        (f"own/torch@sha256:{digest}", "", "sha256:1"),
    ):
        shape = ResourceShape(image=image, content_hash=content_hash)
        assert await cluster.images.pin(shape, cluster.nodes, 5) == pin
    cluster.labels["a"] = image_label("own/torch", other)
    with pytest.raises(ImagesUnfit, match="hint: write `image: own/torch:2@HASH`"):
        await cluster.images.pin(ResourceShape(image="own/torch:2"), cluster.nodes, 5)


@pytest.mark.parametrize(
    ("declared", "of_the_node", "caches"),
    [
        ({}, {}, "{tmp}/state/sygaldry/my-plan"),
        ({}, {"SYGALDRY_PROJECT_ID": "node"}, "{tmp}/state/sygaldry/node"),
        ({"SYGALDRY_PROJECT_ID": "step"}, {"SYGALDRY_PROJECT_ID": "node"}, "{tmp}/state/sygaldry/step"),
        ({"SYGALDRY_CONTAINER_ROOT": "caches"}, {"SYGALDRY_CONTAINER_ROOT": "/node"}, "{tmp}/my plan/sub/caches"),
    ],
)
def test_the_caches_are_those_of_a_container_job(
    declared: dict[str, str], of_the_node: dict[str, str], caches: str, tmp_path: Path
) -> None:
    folder = tmp_path / "my plan" / "sub"
    folder.mkdir(parents=True)
    names = dict.fromkeys(("workflow_id", "run_id", "step_id", "step_name"), "x")
    folders = {"plan_dir": str(folder.parent), "working_dir": str(folder), "log_dir": str(tmp_path)}
    request = StepRequest(**names, **folders, attempt=1, type="command", params={}, timeout_s=9, env=declared)
    attempt_dir(request).mkdir(parents=True)
    shape = pinned_at(ResourceShape(image="torch:2"), request, "sha256:1")
    script = shlex.split(Placing(("a",), FIT).options(shape, "step-1")["runtime_env"]["py_executable"])[-1]
    env = {"XDG_STATE_HOME": str(tmp_path / "state"), "HOME": str(tmp_path), **of_the_node}
    worker = ["worker.py", f"--temp-dir={tmp_path}", "--session-name=now"]
    config = worker_config(WorkerSpec(**json.loads(script)), worker, env, tmp_path)
    sources = {mount["Target"]: mount["Source"] for mount in config["HostConfig"]["Mounts"]}
    assert sources["/opt/hf_cache"] == f"{caches.format(tmp=tmp_path)}/hf_cache"
    assert sources["/opt/spack_store"] == f"{caches.format(tmp=tmp_path)}/spack_store"


def test_an_actor_serves_those_who_may_see_the_same_secrets(
    step_request: Callable[..., StepRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "secrets"
    own = run_secrets_dir(kept, "first")
    own.mkdir(parents=True)
    monkeypatch.setenv("ORCHESTRATE_SECRETS_DIR", str(kept))

    def shape(workflow_id: str, **secrets: str) -> ResourceShape:
        request = step_request(workflow_id=workflow_id, secrets=secrets)
        attempt_dir(request).mkdir(parents=True, exist_ok=True)
        return pinned_at(ResourceShape(image="torch:2"), request, "sha256:1")

    (kept / "KEY").write_text("one")
    (kept / "OTHER").write_text("another")
    before = shape("first", TOKEN="KEY")
    assert before.secrets == ("KEY",) and before == shape("other", TOKEN="KEY") == shape("first", SECRET="KEY")
    assert len({each.identity for each in (before, shape("first", TOKEN="OTHER"), shape("first"))}) == 3
    (own / "KEY").write_text("of the run")
    (own / "UNDECLARED").write_text("of the run")
    assert shape("other", TOKEN="KEY") == before and shape("first", TOKEN="OTHER").own_secrets == ""
    assert shape("first", TOKEN="KEY").own_secrets == str(own.relative_to(kept))
    (tmp_path / "new").write_text("two")
    (tmp_path / "new").replace(kept / "KEY")
    assert shape("other", TOKEN="KEY").identity != before.identity


def container_of(tmp_path: Path, env: Mapping[str, str], **fields: Any) -> tuple[dict[str, str], list[str]]:
    """What the container of an actor sees of the node, by its own path, and its environment."""
    private = tmp_path / "private"
    private.mkdir(exist_ok=True)
    spec = WorkerSpec("a", "sha256:1", "/usr/bin/python3", "/kit", str(tmp_path / "actor"), **fields)
    config = worker_config(spec, ["worker.py", f"--temp-dir={tmp_path}", "--session-name=s"], env, private)
    return {each["Target"]: each["Source"] for each in config["HostConfig"]["Mounts"]}, config["Env"]


def test_a_container_sees_the_secrets_that_are_declared(tmp_path: Path) -> None:
    kept, own = tmp_path / "kept", tmp_path / "kept" / "runs" / "x"
    own.mkdir(parents=True)
    for file in (kept / "KEY", kept / "OTHER", kept / "BOTH", own / "BOTH", own / "UNDECLARED", tmp_path / "outside"):
        file.write_text("value")
    env = {
        "ORCHESTRATE_SECRETS_DIR": str(kept),
        "SYGALDRY_CONTAINER_ROOT": str(tmp_path / "root"),
        "VARIABLE": "of the node",
        "KEY": "not this",
    }
    names = ("BOTH", "KEY", "VARIABLE", "NOWHERE", "../outside")
    seen, variables = container_of(tmp_path, env, secrets=names, own_secrets="runs/x")
    hidden = {"/run/secrets/BOTH": own / "BOTH", "/run/secrets/KEY": kept / "KEY"}
    hidden["/run/secrets/VARIABLE"] = tmp_path / "private" / "secrets" / "VARIABLE"
    assert {goal: Path(seen.pop(goal)) for goal in hidden} == hidden
    assert hidden["/run/secrets/VARIABLE"].read_text() == "of the node"
    assert "ORCHESTRATE_SECRETS_DIR=/run/secrets" in variables and "of the node" not in "".join(variables)
    undeclared, plain = container_of(tmp_path, env)
    assert undeclared == seen and not any(str(kept) in source for source in seen.values())
    assert not any(each.startswith("ORCHESTRATE_SECRETS_DIR") for each in plain)


async def test_the_second_actor_that_does_not_come_up_is_the_last() -> None:
    cluster = Cluster(a=FIT)
    await cluster.place()
    assert not cluster.images.refused(SHAPE)
    assert await cluster.place() == (), "what was known is found out anew"
    assert cluster.images.refused(SHAPE)
    cluster.images.came_up(SHAPE)
    assert not cluster.images.refused(SHAPE)
