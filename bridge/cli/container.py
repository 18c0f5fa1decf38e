"""`orchestrate container`: the standard image, containers in the foreground, what a GPU needs.

build, images -> container.image    launch, shell, run, sync, verify-gpu -> container.foreground
diagnose -> container.gpu
"""

import click

from bridge.cli import container_gpu, container_image, container_launch


@click.group()
def container() -> None:
    """Containers of the standard image: build it, work in it, find out why its GPUs do not work."""


for each in (*container_image.VERBS, *container_launch.VERBS, *container_gpu.VERBS):
    container.add_command(each)

COMMANDS: tuple[click.Command, ...] = (container,)
"""What `orchestrate` adds to its commands."""
