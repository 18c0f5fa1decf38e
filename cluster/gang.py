"""The members of a gang, one on each node: all of them succeed, or the first that does not ends the others.

followers, by rank -> the result of rank 0, or of the member that failed
"""

import asyncio
from collections.abc import Sequence

from cluster.follow import Follower
from steps import StepResult
from steps._files import RESULT, write_whole

_NOT_BEGUN = StepResult(outcome="failed", reason="infrastructure", error="its actor was lost before it began the step")


async def bring_home(followers: Sequence[Follower]) -> StepResult | None:
    """The gang's result; None when no member ever began. Raises `ClusterError`.

    A member's own result is `result.json` beside its logs, but for rank 0, whose folder is the attempt's.
    """
    tasks = [asyncio.ensure_future(follower.run()) for follower in followers]
    try:
        first = await _first_failure(tasks)
        if first is not None:
            for follower in followers:
                follower.end(cancelled=False)
        ended = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    if not any(ended):
        return None
    results = [result or _NOT_BEGUN for result in ended]
    for follower, result in list(zip(followers, results, strict=True))[1:]:
        write_whole(follower.folder / RESULT, result.model_dump_json())
    gpus = tuple(gpu for result in results for gpu in result.gpus)
    if first is None:
        return results[0].model_copy(update={"gpus": gpus})
    # A member whose node is lost makes the others fail, often before the loss is noticed.
    lost = next((rank for rank, result in enumerate(results) if result.reason == "infrastructure"), first)
    return _told(lost, results[lost]).model_copy(update={"gpus": gpus})


async def _first_failure(tasks: Sequence["asyncio.Future[StepResult | None]"]) -> int | None:
    """Rank of the first member that does not succeed; None when all do."""
    rest = set(tasks)
    while rest:
        done, rest = await asyncio.wait(rest, return_when=asyncio.FIRST_COMPLETED)
        for rank, task in enumerate(tasks):
            if task in done and ((result := task.result()) is None or result.outcome != "succeeded"):
                return rank
    return None


def _told(rank: int, result: StepResult) -> StepResult:
    """The result of one member as the gang's, saying whose it is."""
    where = f"rank {rank} on `{result.node}`" if result.node else f"rank {rank}"
    return result.model_copy(update={"error": f"{where}: {result.error}", "outputs": {}})
