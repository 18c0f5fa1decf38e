import asyncio
import base64
import os
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from temporalio import activity, workflow
from temporalio.api.common.v1 import Payload
from temporalio.client import Client
from temporalio.converter import StorageDriverClaim, StorageDriverRetrieveContext, StorageDriverStoreContext
from temporalio.worker import Worker

from bridge.codec import data_converter
from bridge.payload_keys import KEYS_VARIABLE, new_key_line
from bridge.payloads import PAYLOAD_DIR_VARIABLE, FileStorageDriver, PayloadFileError, payload_dir, prune
from bridge.state import State

LARGE = Payload(metadata={"encoding": b"binary/plain"}, data=b"x" * 300_000)


def store(folder: Path, *payloads: Payload) -> list[StorageDriverClaim]:
    return asyncio.run(FileStorageDriver(folder).store(StorageDriverStoreContext(), payloads))


def retrieve(folder: Path, *claims: StorageDriverClaim) -> list[Payload]:
    return asyncio.run(FileStorageDriver(folder).retrieve(StorageDriverRetrieveContext(), claims))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_round_trip_by_content(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    other = Payload(data=b"other")
    claims = store(folder, LARGE, other, LARGE)
    assert claims[0] == claims[2]
    assert len(files(folder)) == 2
    assert retrieve(folder, *claims) == [LARGE, other, LARGE]


def test_files_are_private(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    store(folder, LARGE)
    [file] = files(folder)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_claim_works_where_the_folder_is_mounted_elsewhere(tmp_path: Path) -> None:
    [claim] = store(tmp_path / "here", LARGE)
    assert str(tmp_path) not in str(claim.claim_data)
    (tmp_path / "here").rename(tmp_path / "there")
    assert retrieve(tmp_path / "there", claim) == [LARGE]


def test_missing_file_points_to_the_shared_folder(tmp_path: Path) -> None:
    [claim] = store(tmp_path / "worker", LARGE)
    with pytest.raises(PayloadFileError, match=r"missing: .*client.*\n\nhint: .*ORCHESTRATE_PAYLOAD_DIR"):
        retrieve(tmp_path / "client", claim)


def test_damaged_file_is_noticed_and_a_new_store_repairs_a_short_one(tmp_path: Path) -> None:
    [claim] = store(tmp_path, LARGE)
    [file] = files(tmp_path)
    with file.open("r+b") as opened:
        opened.truncate(1000)
    with pytest.raises(PayloadFileError, match="damaged"):
        retrieve(tmp_path, claim)
    store(tmp_path, LARGE)
    assert retrieve(tmp_path, claim) == [LARGE]


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "a" * 63, "A" * 64])
def test_reference_that_is_not_a_hash_is_refused(tmp_path: Path, digest: str) -> None:
    with pytest.raises(PayloadFileError, match="wanted 64 hex digits"):
        retrieve(tmp_path, StorageDriverClaim({"sha256": digest}))


def test_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PayloadFileError, match=r"bytes cannot be written to `.*folder`"):
        store(tmp_path / "file" / "folder", LARGE)


def test_payload_dir_default_and_variable(tmp_path: Path) -> None:
    assert payload_dir(State(tmp_path), {}) == tmp_path / "payloads"
    assert payload_dir(State(tmp_path), {PAYLOAD_DIR_VARIABLE: "/mnt/shared"}) == Path("/mnt/shared")


def test_prune_removes_old_files_and_forgotten_temporaries(tmp_path: Path) -> None:
    old, read, kept = (Payload(data=bytes([number])) for number in range(3))
    claims = store(tmp_path, old, read, kept)
    for file in files(tmp_path)[:]:
        os.utime(file, (0, 0))
    (tmp_path / "ab").mkdir(exist_ok=True)
    leftover = tmp_path / "ab" / ".new-1-abcd"
    leftover.write_text("half")
    os.utime(leftover, (0, 0))
    retrieve(tmp_path, claims[1])
    store(tmp_path, kept)
    assert prune(tmp_path, 3600) == 1
    assert not leftover.exists()
    assert retrieve(tmp_path, *claims[1:]) == [read, kept]
    assert prune(tmp_path / "none", 3600) == 0


def test_prune_never_takes_what_was_just_stored(tmp_path: Path) -> None:
    driver, done = FileStorageDriver(tmp_path), threading.Event()

    def prune_again_and_again() -> None:
        while not done.is_set():
            for file in files(tmp_path):
                try:
                    os.utime(file, (time.time() - 100, time.time() - 100))
                except FileNotFoundError:
                    continue
            prune(tmp_path, 50)

    thread = threading.Thread(target=prune_again_and_again)
    thread.start()
    payload = Payload(data=b"wanted")
    try:
        for _ in range(60):
            asyncio.run(driver.store(StorageDriverStoreContext(), [payload]))
    finally:
        done.set()
        thread.join(30)
    [claim] = store(tmp_path, payload)
    prune(tmp_path, 50)
    assert retrieve(tmp_path, claim) == [payload]
    assert len(files(tmp_path)) == 1


@activity.defn
def reverse(text: str) -> str:
    """Doubled and backwards, so that the way back is over the limit too."""
    return (text * 2)[::-1]


@workflow.defn(sandboxed=False)
class LargeWorkflow:
    @workflow.run
    async def run(self, text: str) -> str:
        return (await workflow.execute_activity(reverse, text, start_to_close_timeout=timedelta(seconds=60)))[
            :5_000_000
        ]


@pytest.mark.temporal
@pytest.mark.parametrize("encrypted", [False, True])
async def test_large_values_through_a_real_server(temporal_server: str, tmp_path: Path, encrypted: bool) -> None:
    environment = {PAYLOAD_DIR_VARIABLE: str(tmp_path / "shared")}
    if encrypted:
        keys = tmp_path / "keys"
        keys.write_text(new_key_line())
        keys.chmod(0o600)
        environment[KEYS_VARIABLE] = str(keys)
    client = await Client.connect(temporal_server, data_converter=data_converter(State(tmp_path), environment))
    text = "hunter2" + base64.b64encode(os.urandom(2_400_000)).decode()
    assert len(text) > 3_000_000
    queue = f"large-{encrypted}"
    with ThreadPoolExecutor(2) as pool:
        async with Worker(
            client, task_queue=queue, workflows=[LargeWorkflow], activities=[reverse], activity_executor=pool
        ):
            handle = await client.start_workflow(LargeWorkflow.run, text, id=queue, task_queue=queue)
            result = await handle.result()
    assert result == (text * 2)[::-1][:5_000_000]
    history = (await handle.fetch_history()).to_json()
    assert "hunter2" not in history and len(history) < 50_000
    assert str(tmp_path) not in history
    on_disk = b"".join(file.read_bytes() for file in files(tmp_path / "shared"))
    assert (b"orchestrate-zlib" in on_disk) == (not encrypted)
    assert (b"aes256gcm" in on_disk) == encrypted

    other = await Client.connect(
        temporal_server,
        data_converter=data_converter(State(tmp_path), {**environment, PAYLOAD_DIR_VARIABLE: str(tmp_path / "other")}),
    )
    with pytest.raises(PayloadFileError, match="is missing"):
        await other.get_workflow_handle(queue).result()


@pytest.mark.temporal
async def test_run_waits_while_no_worker_has_its_key(temporal_server: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(new_key_line("the-key"))
    keys.chmod(0o600)
    environment = {KEYS_VARIABLE: str(keys)}
    with_key = await Client.connect(temporal_server, data_converter=data_converter(State(tmp_path), environment))
    without = await Client.connect(temporal_server, data_converter=data_converter(State(tmp_path), {}))
    with ThreadPoolExecutor(1) as pool:
        async with Worker(
            without, task_queue="keys", workflows=[LargeWorkflow], activities=[reverse], activity_executor=pool
        ):
            handle = await with_key.start_workflow(LargeWorkflow.run, "abc", id="keys", task_queue="keys")
            failed = ""
            while not failed:
                await asyncio.sleep(0.05)
                events = (await handle.fetch_history()).events
                failed = "".join(event.workflow_task_failed_event_attributes.failure.message for event in events)
    assert "`the-key`, and no keys are configured" in failed
    status = (await handle.describe()).status
    assert status is not None and status.name == "RUNNING"
    await handle.terminate()
