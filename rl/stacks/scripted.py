"""A stack without a model, in this process: generators that take their time, a trainer that counts. For tests of the
loop, and to measure what a loop costs at sizes that this machine does not have.

    loop --GroupRequest--> ScriptedGenerator (sleeps by a latency model) --Group--> ScriptedTrainer (counts)

Time is the event loop's, so it is real under `asyncio.run` and virtual under `rl.virtual_clock.run_virtually`. What a
conversation is worth depends on its group, its number and the seed alone, not on when it was sampled.
"""

import asyncio
import hashlib
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import fmean

from rl.config import RunConfig
from rl.ledger import Ledger
from rl.stack import GroupRequest, Loaded, PartLost, Published
from rl.types import UNSAMPLED, Batch, Frozen, Group, TrainMetrics, Trajectory, Turn

_NUM_BYTES = 1 << 20


def long_tailed(request: GroupRequest) -> float:
    """Seconds that a group takes: log-normal with median 1 s, the same for the same group."""
    return _random(request.seed, request.group_id).lognormvariate(0.0, 0.8)


def coin(request: GroupRequest, sample: int) -> float:
    """A reward of 0 or 1, the same for the same conversation."""
    return float(_random(request.seed, request.group_id, sample).random() < 0.5)


class Script(Frozen):
    """How long the parts take, in seconds, and what they give."""

    generate_s: Callable[[GroupRequest], float] = long_tailed
    update_s: float = 1.0
    snapshot_s: float = 0.01
    push_s: float = 0.1
    load_s: float = 0.1
    save_s: float = 0.1
    replace_s: float = 0.5
    reward: Callable[[GroupRequest, int], float] = coin
    num_tokens: int = 8
    """Sampled tokens of a conversation; they come one after the other, each by the weights of its moment."""


class _Part:
    """Something that can be lost, which ends whatever it does."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lost = asyncio.Event()

    def lose(self) -> None:
        """From now on every call, running ones too, raises `PartLost`."""
        self._lost.set()

    async def work(self, duration_s: float) -> None:
        """Be busy for so long. Raises `PartLost`."""
        try:
            async with asyncio.timeout(duration_s):
                await self._lost.wait()
        except TimeoutError:
            return
        raise PartLost(f"{self._name} is gone")


class ScriptedGenerator(_Part):
    """A `Generator` whose conversations are one turn of made-up tokens."""

    def __init__(self, number: int, script: Script, store: "Store", version: int) -> None:
        super().__init__(f"generator {number}")
        self._script = script
        self._store = store
        self.version = version

    async def generate(self, request: GroupRequest) -> Group:
        """The group, after the time that the script gives it."""
        versions: list[int] = []
        duration_s = self._script.generate_s(request) / self._script.num_tokens
        for _ in range(self._script.num_tokens):
            versions.append(self.version)
            await self.work(duration_s)
        trajectories = [self._trajectory(request, sample, versions) for sample in range(request.group_size)]
        return Group(id=request.group_id, prompt=request.prompt, trajectories=tuple(trajectories))

    async def load(self, version: int) -> Loaded:
        """The newest version that was published."""
        await self.work(self._script.load_s)
        assert self._store.published is not None and self._store.published >= version, f"version {version} is not there"
        self.version = self._store.published
        return Loaded(version=self.version, num_bytes=_NUM_BYTES, pull_s=self._script.load_s, reload_s=0.0, pause_s=0.0,
                      parity=0.0)  # fmt: skip

    def _trajectory(self, request: GroupRequest, sample: int, versions: list[int]) -> Trajectory:
        reward = self._script.reward(request, sample)
        return Trajectory(
            prompt=request.prompt,
            group_id=request.group_id,
            sample=sample,
            token_ids=(0, *range(1, len(versions) + 1)),
            loss_mask=(False, *(True for _ in versions)),
            logprobs=(0.0, *(-1.0 for _ in versions)),
            versions=(UNSAMPLED, *versions),
            turns=(Turn(text="", num_tokens=len(versions)),),
            stop_reason="answer",
            answer=request.prompt.answer if reward > 0 else request.prompt.answer + 1,
            failure_mode="success" if reward > 0 else "wrong_answer",
            reward=reward,
        )


class ScriptedTrainer(_Part):
    """A `Trainer` whose weights are the list of groups that it was given."""

    def __init__(self, script: Script, store: "Store", folder: str = "") -> None:
        super().__init__("the trainer")
        self._script = script
        self._store = store
        self._turn = asyncio.Lock()
        self.trained: list[list[int]] = []
        """[updates] the groups of each."""
        if folder:
            self.trained = json.loads(Path(folder, "trained.json").read_text())

    @property
    def ledger(self) -> Ledger:
        """What the weights were made of."""
        return Ledger(trained=tuple(tuple(groups) for groups in self.trained))

    async def update(self, batch: Batch) -> TrainMetrics:
        """Count the batch. AssertionError where it is not for the weights as they are."""
        assert batch.version == len(self.trained), f"weights are of version {len(self.trained)}, not {batch.version}"
        async with self._turn:
            await self.work(self._script.update_s)
            self.trained.append([int(group.id) for group in batch.groups])
        trajectories = batch.trajectories
        return TrainMetrics(
            update=batch.update,
            version=len(self.trained),
            loss=0.0,
            gradient_norm=0.0,
            learning_rate=0.0,
            num_groups=len(batch.groups),
            num_trajectories=len(trajectories),
            num_tokens=sum(one.num_sampled for one in trajectories),
            mean_reward=fmean(one.reward for one in trajectories),
            correct_rate=fmean(one.failure_mode == "success" for one in trajectories),
            format_rate=fmean(one.answer is not None for one in trajectories),
            staleness_mean=fmean(batch.staleness),
            staleness_max=max(batch.staleness),
            effective_sample_size=1.0,
            k3_kl=0.0,
            clip_fraction=0.0,
            entropy=0.0,
            duration_s=self._script.update_s,
        )

    async def publish(self) -> Published:
        """The version goes to the store, after the time that the script gives it."""
        async with self._turn:
            version = len(self.trained)
            await self.work(self._script.snapshot_s)
        await self.work(self._script.push_s)
        self._store.published = version
        script = self._script
        return Published(version=version, num_bytes=_NUM_BYTES, snapshot_s=script.snapshot_s, push_s=script.push_s)

    async def save(self, folder: str) -> None:
        """The list as JSON."""
        await self.work(self._script.save_s)
        Path(folder, "trained.json").write_text(json.dumps(self.trained))


class Store:
    """Where the trainer leaves versions."""

    published: int | None = None


class ScriptedStack:
    """A `Stack` whose parts can be lost on demand."""

    def __init__(self, config: RunConfig, folder: str = "", script: Script | None = None) -> None:
        self._script = Script() if script is None else script
        self._store = Store()
        self.trainer = ScriptedTrainer(self._script, self._store, folder)
        version = len(self.trainer.trained)
        self.generators = [
            ScriptedGenerator(number, self._script, self._store, version) for number in range(config.num_generators)
        ]

    async def replace_generator(self, number: int, version: int) -> None:
        """Another generator in the place of one that was lost."""
        await asyncio.sleep(self._script.replace_s)
        self.generators[number] = ScriptedGenerator(number, self._script, self._store, version)

    async def replace_trainer(self, folder: str) -> None:
        """Another trainer in the place of the one that was lost."""
        await asyncio.sleep(self._script.replace_s)
        self.trainer = ScriptedTrainer(self._script, self._store, folder)


@asynccontextmanager
async def open_stack(config: RunConfig, folder: str = "") -> AsyncIterator[ScriptedStack]:
    """The parts, by the default script."""
    yield ScriptedStack(config, folder)


def _random(*of: object) -> random.Random:
    return random.Random(hashlib.sha256("/".join(map(str, of)).encode()).digest())
