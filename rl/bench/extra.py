"""What is measured beside the cells, each in a process of its own: `python -m rl.bench.extra REQUEST.json RESULT.json`.

ExtraRequest -> peer_trl | transports | recovery | simulate -> Extra
"""

from pathlib import Path
from typing import Literal

from rl.bench.child import answer
from rl.bench.config import BenchConfig
from rl.bench.results import CellRun, Recovery, Results, Simulation, Transport
from rl.types import Frozen


class ExtraRequest(Frozen):
    """What a child is to measure."""

    part: Literal["peers", "transports", "recovery", "simulation"]
    config: BenchConfig
    folder: str = ""
    """Where what is said meanwhile is kept."""
    seed: int = 0
    repeat: int = 0
    stack: str = ""
    killed: Literal["trainer", "generator"] = "generator"
    results: Results | None = None
    """So far; for `simulation`."""


class Extra(Frozen):
    """What a child found."""

    runs: tuple[CellRun, ...] = ()
    transports: tuple[Transport, ...] = ()
    recoveries: tuple[Recovery, ...] = ()
    simulations: tuple[Simulation, ...] = ()


def measure(request: ExtraRequest) -> Extra:
    """Dispatch."""
    config, folder = request.config, Path(request.folder)
    match request.part:
        case "peers":
            from rl.bench.peer_trl import run_peer

            return Extra(runs=(run_peer(config, request.seed, request.repeat, folder),))
        case "transports":
            from rl.bench.transports import measure_transports

            return Extra(transports=tuple(measure_transports(config.quick)))
        case "recovery":
            from rl.bench.recovery import measure_recovery

            return Extra(recoveries=(measure_recovery(config, request.stack, request.killed, request.seed, folder),))
        case "simulation":
            from rl.bench.simulate import simulate

            assert request.results is not None, "a simulation is fitted to results"
            return Extra(simulations=tuple(simulate(request.results, config.quick)))


def main() -> None:
    """The child."""
    answer(ExtraRequest, measure)


if __name__ == "__main__":
    main()
