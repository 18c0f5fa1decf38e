"""Chores of the local worker, against a real server and real files."""

import os
from pathlib import Path

import pytest
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest

from bridge.housekeeping import REMEMBERED, UNUSED, keep_house
from bridge.payloads import payload_dir
from bridge.state import State
from bridge.temporal import connect_temporal

pytestmark = pytest.mark.temporal


async def test_runs_are_remembered_and_old_payloads_removed(temporal_server: str, tmp_path: Path) -> None:
    state = State(tmp_path / "state").create()
    temporal = await connect_temporal(temporal_server, None, state)
    folder = payload_dir(state, {})
    paths = [folder / name[:2] / name for name in ("a" * 64, "b" * 64)]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"payload")
    long_ago = paths[0].stat().st_mtime - UNUSED.total_seconds() - 60
    os.utime(paths[0], (long_ago, long_ago))
    await keep_house(temporal, state)
    answer = await temporal.workflow_service.describe_namespace(DescribeNamespaceRequest(namespace="default"))
    assert answer.config.workflow_execution_retention_ttl.ToTimedelta() == REMEMBERED
    assert [path.exists() for path in paths] == [False, True]
