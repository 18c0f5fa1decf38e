"""Build a plan in Python, run it, and read what it gave: python examples/library.py

The local services are found or started, as by `orchestrate`; with TEMPORAL_ADDRESS set, that server is used.
"""

import asyncio
from pathlib import Path

from bridge.client import Client
from bridge.plan import Plan, Retry, Step

PLAN = Plan(
    name="library",
    steps=[
        Step(
            id="throw",
            type="python",
            params={"call": "dice:roll", "arguments": {"seed": "${{ matrix.seed }}", "sides": 6, "times": 1000}},
            matrix={"seed": [1, 2, 3]},
            outputs=["mean", "sides"],
            retry=Retry(max_attempts=2),
        ),
        Step(
            id="compare",
            type="python",
            params={
                "call": "dice:compare",
                "arguments": {"means": "${{ steps.throw.outputs.mean }}", "sides": "${{ steps.throw.outputs.sides }}"},
            },
            depends_on=["throw"],
            outputs=["bias"],
        ),
    ],
)


async def main() -> None:
    """Run the plan and print its report."""
    client = await Client.connect()
    report = await client.run(PLAN, plan_dir=Path(__file__).parent)
    for step in report.steps:
        print(f"{step.id:10} {step.outcome:10} {step.duration_s:6.3f} s  {step.outputs}")
    print(f"{report.plan}: {report.outcome} in {report.duration_s:.2f} s")


if __name__ == "__main__":
    asyncio.run(main())
