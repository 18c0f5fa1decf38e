"""`orchestrate rl`: reinforcement learning: train, evaluate, curves, models, the benchmark."""

import click

from bridge.cli.rl_bench import bench
from bridge.cli.rl_compare import compare_results
from bridge.cli.rl_curves import curves
from bridge.cli.rl_eval import evaluate
from bridge.cli.rl_model import model
from bridge.cli.rl_report import report
from bridge.cli.rl_train import train


@click.group()
def rl() -> None:
    """Train language models by asynchronous RL on multi-step tool use, and measure them.

    The tasks are `simple`, `compositional` (easy, medium, hard), `multi_step` and `recursive`.
    """


for command in (train, evaluate, curves, model, bench, report, compare_results):
    rl.add_command(command)

COMMANDS = (rl,)
