"""Weights by version through every transport: exact, newest first, torn reads found, small parts shared."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rl.tokenizer import TinyTokenizer
from rl.transports import file, shared_memory
from rl.weights import (
    NUM_SLOTS,
    Header,
    Manifest,
    TornRead,
    WeightsMissing,
    WeightStoreHandle,
    largest_difference,
    open_reader,
    open_writer,
    probe_tokens,
)

State = dict[str, torch.Tensor]


def state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(7, 5, generator=generator)
    return {
        "embed.weight": embedding,
        "layer.weight": torch.randn(3, 5, generator=generator),
        "layer.bias": torch.randn(3, generator=generator).bfloat16(),
        "scale": torch.tensor(float(seed)),
        "head.weight": embedding,
    }


def same(found: Any, expected: State) -> bool:
    return set(found) == {"embed.weight", "layer.weight", "layer.bias", "scale"} and all(
        torch.equal(found[name], expected[name]) for name in found
    )


@pytest.fixture(params=["shared_memory", "file"])
def store(request: pytest.FixtureRequest) -> Any:
    module = {"shared_memory": shared_memory, "file": file}[request.param]
    handle = module.create()
    yield handle
    module.remove(handle)
    assert not Path(handle.place).exists()


def test_tied_tensors_are_there_once_and_everything_is_aligned() -> None:
    manifest = Manifest.of(state(1))
    assert [entry.name for entry in manifest.entries] == ["embed.weight", "layer.weight", "layer.bias", "scale"]
    assert all(entry.offset % 64 == 0 for entry in manifest.entries)
    buffer = torch.zeros(manifest.num_bytes, dtype=torch.uint8)
    manifest.pack(state(1), buffer)
    assert same(manifest.views(buffer), state(1))
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


async def test_readers_get_the_newest_version_exactly(store: WeightStoreHandle) -> None:
    reader, manifest = open_reader(store), Manifest.of(state(0))
    with pytest.raises(WeightsMissing):
        await reader.pull(0)
    writer = open_writer(store, manifest)
    for version in range(2 * NUM_SLOTS):
        writer.snapshot(Header(version=version, probe=(-0.1, -float(version))), state(version))
        assert await writer.push() == manifest.num_bytes
        pulled = await reader.pull(max(0, version - 1))
        pulled.check()
        assert pulled.header == Header(version=version, probe=(-0.1, -float(version)))
        assert pulled.num_bytes >= sum(entry.num_bytes for entry in manifest.entries)
        assert same(pulled.tensors, state(version))
    with pytest.raises(WeightsMissing, match=f"{2 * NUM_SLOTS}"):
        await reader.pull(2 * NUM_SLOTS)


async def test_a_snapshot_is_seen_only_when_it_was_pushed_and_changes_no_more(store: WeightStoreHandle) -> None:
    weights = state(1)
    writer, reader = open_writer(store, Manifest.of(weights)), open_reader(store)
    writer.snapshot(Header(version=1), weights)
    weights["layer.weight"].add_(1.0)
    with pytest.raises(WeightsMissing):
        await reader.pull(1)
    await writer.push()
    assert same((await reader.pull(1)).tensors, state(1))


async def test_the_next_trainer_goes_on_with_the_store_of_a_dead_one(store: WeightStoreHandle) -> None:
    reader = open_reader(store)
    # The last one was restored from an older checkpoint.
    for version in (4, 5, 6, 7, 2, 3):
        writer = open_writer(store, Manifest.of(state(0)))
        writer.snapshot(Header(version=version), state(version))
        await writer.push()
        pulled = await reader.pull(version)
        assert pulled.header.version == version
        assert same(pulled.tensors, state(version))


async def test_another_model_replaces_the_weights_of_the_first() -> None:
    handle = shared_memory.create()
    reader = open_reader(handle)
    for weights in (state(1), {"other": torch.arange(3.0)}):
        writer = open_writer(handle, Manifest.of(weights))
        writer.snapshot(Header(version=1), weights)
        await writer.push()
        assert set((await reader.pull(1)).tensors) <= set(weights)
    shared_memory.remove(handle)


async def test_a_read_that_was_overtaken_is_found_out() -> None:
    handle = shared_memory.create()
    writer, reader = open_writer(handle, Manifest.of(state(0))), open_reader(handle)
    writer.snapshot(Header(version=0), state(0))
    await writer.push()
    pulled = await reader.pull(0)
    for version in range(1, NUM_SLOTS):
        writer.snapshot(Header(version=version), state(version))
        await writer.push()
    pulled.check()
    writer.snapshot(Header(version=NUM_SLOTS), state(NUM_SLOTS))
    with pytest.raises(TornRead, match="overwritten by 3"):
        pulled.check()
    shared_memory.remove(handle)


async def test_a_slot_whose_writer_died_in_the_middle_is_not_read() -> None:
    handle = shared_memory.create()
    weights = state(0)
    writer = shared_memory.Writer(handle, Manifest.of(weights))
    with pytest.raises(KeyError):
        writer.snapshot(Header(version=3), {"embed.weight": weights["embed.weight"]})
    await writer.push()
    with pytest.raises(WeightsMissing, match="no weights yet"):
        await open_reader(handle).pull(3)
    writer._mapped.point_at(0)
    with pytest.raises(TornRead):
        await open_reader(handle).pull(3)
    shared_memory.remove(handle)


def test_stores_of_dead_owners_are_removed() -> None:
    script = "from rl.transports import shared_memory as s; h = s.create(); open(h.place, 'w').close(); print(h.place)"
    left = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60).stdout
    assert Path(left.strip()).exists()
    shared_memory.create()
    assert not Path(left.strip()).exists()


def test_stores_of_another_number_space_are_let_be() -> None:
    place = Path(shared_memory.create().place)
    prefix, numbered, _ = place.name.rsplit("-", 2)
    # Of a container that shares the folder: its numbers of processes say nothing here.
    other = place.with_name(f"{prefix.rpartition('-')[0]}-999999999-{int(numbered) + 1}-abc")
    other.touch()
    try:
        shared_memory.create()
        assert other.exists()
    finally:
        other.unlink()


def test_weights_that_have_no_room_are_refused(tmp_path: Path) -> None:
    handle = WeightStoreHandle(transport="shared_memory", place=str(tmp_path / "store"))
    huge = Manifest.of({"a": torch.zeros(1, dtype=torch.uint8).expand(1 << 50)})
    with pytest.raises(OSError, match=r"hint: more shared memory"):
        open_writer(handle, huge)
    assert not list(tmp_path.iterdir())


def test_the_probe_is_a_conversation_and_knows_what_differs() -> None:
    tokenizer = TinyTokenizer()
    tokens = probe_tokens(tokenizer)
    assert tokens == probe_tokens(tokenizer)
    assert "[ANSWER] 42" in tokenizer.decode(tokens)
    assert largest_difference((-1.0, -2.0), (-1.0, -2.5)) == 0.5
    assert largest_difference((-1.0,), (float("nan"),)) == float("inf")
    assert largest_difference((-1.0,), ()) == float("inf")


OVER_RAY = """
import asyncio, os, sys, torch, ray
from rl.weights import Header, Manifest, NUM_SLOTS, WeightsMissing, open_reader, open_writer
from rl.transports import ray_objects

async def main():
    ray.init(sys.argv[1], namespace="weights", log_to_driver=False, logging_level="error")
    handle = ray_objects.create()
    weights = {"a": torch.randn(300, 300), "b": torch.randn(5).bfloat16()}
    reader, writer = open_reader(handle), open_writer(handle, Manifest.of(weights))
    try:
        await reader.pull(0)
        raise AssertionError("there are weights")
    except WeightsMissing:
        pass
    for version in range(NUM_SLOTS + 2):
        weights["a"] += 1
        writer.snapshot(Header(version=version, probe=(-1.5,)), weights)
        await writer.push()
        pulled = await reader.pull(version)
        pulled.check()
        assert pulled.header == Header(version=version, probe=(-1.5,))
        assert all(torch.equal(pulled.tensors[name], weights[name]) for name in weights)
    writer = open_writer(handle, Manifest.of(weights))
    writer.snapshot(Header(version=1), weights)
    await writer.push()
    assert (await reader.pull(1)).header.version == 1
    ray_objects.remove(handle)
    print("exact")

asyncio.run(main())
"""

OVER_MONARCH = """
import asyncio, os, sys
os.environ["HYPERACTOR_MESH_SUPERVISION_POLL_FREQUENCY"] = "500ms"
import torch
from monarch.actor import Actor, endpoint, this_host, shutdown_context
from rl.weights import Header, Manifest, NUM_SLOTS, TornRead, WeightsMissing, open_reader, open_writer
from rl.transports import monarch_rdma

class End(Actor):
    def __init__(self, handle):
        self.handle = handle
        self.reader = self.writer = None
    @endpoint
    async def write(self, version, push):
        weights = {"a": torch.arange(90_000.0) + version, "b": torch.full((5,), float(version)).bfloat16()}
        if self.writer is None:
            self.writer = open_writer(self.handle, Manifest.of(weights))
        self.writer.snapshot(Header(version=version, probe=(-1.5,)), weights)
        if push:
            await self.writer.push()
    @endpoint
    async def read(self, version):
        if self.reader is None:
            self.reader = open_reader(self.handle)
        try:
            pulled = await self.reader.pull(version)
        except (WeightsMissing, TornRead) as error:
            return type(error).__name__
        pulled.check()
        wanted = torch.arange(90_000.0) + pulled.header.version
        return pulled.header.version if torch.equal(pulled.tensors["a"], wanted) else "wrong"

async def main():
    handle = monarch_rdma.create()
    writer, reader = (
        this_host().spawn_procs(per_host={"procs": 1}, name=f"{name}_procs").spawn(name, End, handle)
        for name in ("writer", "reader")
    )
    assert await reader.read.call_one(0) == "WeightsMissing"
    for version in range(NUM_SLOTS + 2):
        await writer.write.call_one(version, True)
        assert await reader.read.call_one(version) == version
    for version in range(NUM_SLOTS + 2, 2 * NUM_SLOTS + 2):
        await writer.write.call_one(version, False)
    # The newest that was pushed has been overwritten by snapshots that were not.
    assert await reader.read.call_one(0) == "TornRead"
    monarch_rdma.remove(handle)
    print("exact")

asyncio.run(main())
shutdown_context().get()
"""


@pytest.mark.ray
def test_weights_travel_through_rays_object_store(ray_head: Any, tmp_path: Path) -> None:
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(ray_head.token_file)}
    assert _output(OVER_RAY, ray_head.address, environment).endswith("exact\n")


def test_weights_travel_by_monarchs_one_sided_reads() -> None:
    assert _output(OVER_MONARCH, "", dict(os.environ)).endswith("exact\n")


def _output(script: str, argument: str, environment: dict[str, str]) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", script, argument], capture_output=True, text=True, env=environment, timeout=120
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stdout
