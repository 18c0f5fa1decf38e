"""TRL's `GRPOTrainer` in a cell of ours: same model, prompts, lengths, reward, samples of an update, and threads.

    run_peer -> peer_python -> rl.bench.peer_trl_run, in TRL's environment -> CellRun

It samples by transformers' `generate`, so it is to be held against our stack `local`, mode `sync-colocated`, engine
`hf`. Its samples have the lengths that ours have (`rl.lengths`), the last token being the end-of-turn token.
"""

import asyncio
import os
import tempfile
from pathlib import Path

from rl.bench.cells import cores_of
from rl.bench.child import ChildFailed, measure_apart
from rl.bench.config import BenchConfig
from rl.bench.peer_environment import NoEnvironment, peer_python
from rl.bench.results import CellKey, CellRun
from rl.models import prepare
from rl.types import Frozen

PEER = CellKey(stack="trl", mode="sync-colocated", engine="hf")


class PeerRequest(Frozen):
    """What the other environment is to measure."""

    config: BenchConfig
    run: CellRun
    """Without numbers."""
    model_folder: str
    cores: tuple[int, ...]
    folder: str
    """Where the trainer may write."""


def run_peer(config: BenchConfig, seed: int, repeat: int, folder: Path, order: int = 0) -> CellRun:
    """The cell's run, with the reason in `error` where it has no numbers. What it says is kept in `folder`.

    The first one makes the environment.
    """
    run = CellRun(key=PEER, seed=seed, repeat=repeat, order=order, load_before=os.getloadavg()[0])
    trainer, generators = cores_of(config)
    cores = sorted({*trainer, *(core for each in generators for core in each)})
    try:
        python, model = peer_python(), prepare(config.model, seed)
        with tempfile.TemporaryDirectory(prefix="orchestrate-trl-") as temporary:
            # A path to our own packages would put them before TRL's.
            modules = Path(temporary, "modules")
            modules.mkdir()
            (modules / "rl").symlink_to(Path(__file__).parents[1])
            apart = measure_apart(
                "rl.bench.peer_trl_run",
                PeerRequest(config=config, run=run, model_folder=model.path, cores=tuple(cores), folder=temporary),
                CellRun,
                folder / "run",
                config.cell_timeout_s,
                python=python,
                environment=_environment(modules, len(cores)),
            )
            return asyncio.run(apart)
    except (NoEnvironment, ChildFailed, OSError) as failure:
        return run.model_copy(update={"error": str(failure)})


def _environment(modules: Path, num_threads: int) -> dict[str, str]:
    """Of the other interpreter, which sees `modules` of ours."""
    dropped = ("PYTHON", "VIRTUAL_ENV", "RAY_", "OMP_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {
        **kept,
        "PYTHONPATH": str(modules),
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
