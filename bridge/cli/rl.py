"""`orchestrate rl`: reinforcement learning. See `rl_train`, `rl_eval`, `rl_curves`, `rl_model`, `rl_bench` and others."""

import click

from bridge.cli.rl_bench import bench
from bridge.cli.rl_compare import compare_results
from bridge.cli.rl_curves import curves
from bridge.cli.rl_eval import evaluate
from bridge.cli.rl_model import model
from bridge.cli.rl_train import train


@click.group()
def rl() -> None:
    """Train language models by asynchronous RL on multi-step tool use, and measure them.

    The tasks are `simple`, `compositional` (easy, medium, hard), `multi_step` and `recursive`.
    """


for command in (train, evaluate, curves, model, bench, compare_results):
    rl.add_command(command)

COMMANDS = (rl,)
