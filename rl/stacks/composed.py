"""A stack of two halves, each of which knows how to replace what it lost: composition only."""

from collections.abc import Sequence
from typing import Protocol

from rl.stack import Generator, Trainer


class Trainers(Protocol):
    """The trainer of a run, one after the other."""

    @property
    def living(self) -> Trainer | None:
        """None before the first is open."""
        ...

    async def replace(self, folder: str) -> None:
        """Another one, restored from `folder`."""
        ...


class Generators(Protocol):
    """The generators of a run."""

    @property
    def living(self) -> Sequence[Generator]:
        """By number."""
        ...

    async def replace(self, number: int, version: int) -> None:
        """Another one in the place, with the weights of `version`."""
        ...


class ComposedStack:
    """A `Stack` of both."""

    def __init__(self, trainers: Trainers, generators: Generators) -> None:
        self._trainers = trainers
        self._generators = generators

    @property
    def trainer(self) -> Trainer:
        """The one that lives now."""
        assert self._trainers.living is not None, "the stack is not open"
        return self._trainers.living

    @property
    def generators(self) -> Sequence[Generator]:
        """Those that live now."""
        return self._generators.living

    async def replace_generator(self, number: int, version: int) -> None:
        """By the half that has them."""
        await self._generators.replace(number, version)

    async def replace_trainer(self, folder: str) -> None:
        """By the half that has it."""
        await self._trainers.replace(folder)
