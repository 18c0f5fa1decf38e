"""Old runs survive an upgrade: recorded histories are replayed by the workflow code of today.

Record the plans below anew, for an addition that needs a new shape of history, with

    python tests/test_replay.py tests/histories
"""

import asyncio
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import temporalio
from temporalio.client import WorkflowHistory
from temporalio.worker import Replayer, UnsandboxedWorkflowRunner

from bridge.codec import data_converter
from bridge.plan import Plan, Step
from bridge.state import State
from bridge.workflow import PlanWorkflow

HISTORIES = sorted((Path(__file__).parent / "histories").glob("*.json"))


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.stem)
async def test_a_recorded_history_replays(path: Path, tmp_path: Path) -> None:
    replayer = Replayer(
        workflows=[PlanWorkflow],
        data_converter=data_converter(State(tmp_path)),
        workflow_runner=UnsandboxedWorkflowRunner(),
    )
    await replayer.replay_workflow(WorkflowHistory.from_json(path.stem, path.read_text()))


async def test_a_changed_decision_is_noticed(tmp_path: Path) -> None:
    path = next(path for path in HISTORIES if path.stem == "flow")
    changed = path.read_text().replace('"activityId": "a/1"', '"activityId": "b/1"')
    assert changed != path.read_text()
    replayer = Replayer(
        workflows=[PlanWorkflow],
        data_converter=data_converter(State(tmp_path)),
        workflow_runner=UnsandboxedWorkflowRunner(),
    )
    with pytest.raises(Exception, match="Nondeterminism"):
        await replayer.replay_workflow(WorkflowHistory.from_json("flow", changed))


def _shell(step_id: str, script: str, **fields: Any) -> Step:
    return Step.model_validate(
        {"id": step_id, "type": "command", "params": {"command": "sh", "args": ["-c", script]}, **fields}
    )


PLANS = {
    "flow": Plan(
        steps=[
            _shell("a", "echo '{\"n\": [1, 2, 3]}' >> $STEP_OUTPUTS"),
            _shell(
                "m", "echo $N", matrix={"n": "${{ steps.a.outputs.n }}"}, max_parallel=2, env={"N": "${{ matrix.n }}"}
            ),
            _shell("end", "true", depends_on=["m"], locks=["x"]),
        ]
    ),
    "failure": Plan(
        on_failure="cancel",
        steps=[
            _shell("bad", "sleep 0.3; exit 3", retry={"max_attempts": 2, "backoff_s": 0.05}),
            _shell("slow", "sleep 60"),
            _shell("after", "true", depends_on=["bad"]),
            _shell("handler", "true", when={"step": "bad", "status": "failure"}),
        ],
    ),
    "cancelled": Plan(steps=[_shell("slow", "sleep 60"), _shell("clean", "true", when="always", depends_on=["slow"])]),
    "cached": Plan(steps=[_shell("a", "true", cache=True), _shell("b", "true", cache=True, depends_on=["a"])]),
}


async def record(folder: Path) -> None:
    """Run every plan on the local services and keep its history."""
    from bridge.client import Client

    client = await Client.connect()
    for name, plan in PLANS.items():
        for _ in range(2 if name == "cached" else 1):
            run = await client.start(
                plan.model_copy(update={"name": name}),
                plan_dir="/",
                log_dir="/tmp/replay",
                workflow_id=uuid.uuid4().hex,
            )
            if name == "cancelled":
                await asyncio.sleep(1)
                await client.cancel(run.workflow_id)
            await client.wait(run.workflow_id, run.run_id)
        history = await client.temporal.get_workflow_handle(run.workflow_id).fetch_history()
        site_packages = f"{Path(temporalio.__file__).parents[1]}/"
        (folder / f"{name}.json").write_text(history.to_json().replace(site_packages, "") + "\n")


if __name__ == "__main__":
    asyncio.run(record(Path(sys.argv[1])))
