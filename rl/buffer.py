"""Places for groups, and the order in which they are trained on: what bounds the staleness.

    admit (waits for a place) -> generate -> finish -> take (waits for a batch) -> update -> release (weights are live)
                 ^----------------------------- a place is free ------------------------------'

With P groups per update and staleness S there are (S + 1) P places. A group holds one from before its first token
until the weights it trained are live in every generator. Policy `pace` trains on groups in the order of their prompts.
When a group is admitted, weights of version v are live and the trainer is at u >= v: the (u - v) P groups that were
trained on since hold a place each, so with it at most (S + 1) P - (u - v) P groups are still to be trained on. They
are gone after update v + S, which therefore trains on it at the latest: no group is ever staler than S, whatever the
durations, and the order of training depends on the prompts and their rewards alone. S = 0 is synchronous.

Policy `drop` frees the place when the group is taken, takes groups as they come, and drops those that became stale.
"""

import asyncio
from itertools import islice
from typing import Literal

from rl.ledger import Index, Ledger, RunState
from rl.types import Group

_MOST_FILTERED = 10
"""Batches' worth of groups in a row that are filtered; what comes then is trained on, so that every run ends."""


class TooStale(AssertionError):
    """A batch broke the bound of staleness, which is a defect of the loop."""


class Buffer:
    """The groups of one run that are not trained on yet. Belongs to one event loop."""

    def __init__(
        self,
        state: RunState,
        *,
        groups_per_update: int,
        max_staleness: int,
        updates: int,
        policy: Literal["pace", "drop"] = "pace",
        filter_zero_variance: bool = True,
    ) -> None:
        self._size = groups_per_update
        self._max_staleness = max_staleness
        self._pace = policy == "pace"
        self._filter = filter_zero_variance
        self._filtered_in_a_row = state.filtered_in_a_row

        self.cursor = state.cursor
        self.tokens = state.tokens
        self._trained = list(state.ledger.trained)
        self._filtered = set(state.ledger.filtered)
        self._dropped = set(state.ledger.dropped)
        self._again = sorted(state.unfinished, reverse=True)
        groups = {int(group.id): group for group in state.finished}
        self._waiting: dict[Index, Group | None] = {
            index: groups.get(index) for index in sorted((*state.unfinished, *groups))
        }
        """In the order of prompts; None while the group is sampled."""
        self.num_finished = len(groups)
        """Groups that wait to be trained on."""
        self._news = list(groups)
        """Those that came since somebody looked for stale ones."""
        self._looked_at = -1
        """Update before which all were looked at."""
        self._missing: Index | None = None
        """Without it there is no batch, by policy `pace`."""
        self._held = [0] * state.update
        """[updates done] places that wait for the weights of the update to be live."""
        self._live = state.update

        places = groups_per_update * (max_staleness + 1) - len(groups)
        wanted = groups_per_update * (updates - state.update) - len(groups)
        self._places = asyncio.Semaphore(max(0, places))
        self._wanted = asyncio.Semaphore(max(0, wanted))
        """Groups that the rest of the run still has to ask for, so that it ends with none to spare."""
        self._arrived = asyncio.Event()

    @property
    def num_filtered(self) -> int:
        """Groups left out for equal rewards, so far."""
        return len(self._filtered)

    @property
    def num_dropped(self) -> int:
        """Groups left out for their staleness, so far."""
        return len(self._dropped)

    async def admit(self) -> Index:
        """A prompt to be sampled, when there is a place for its group; those given back come first."""
        await self._wanted.acquire()
        try:
            await self._places.acquire()
        except BaseException:
            self._wanted.release()
            raise
        if self._again:
            return self._again.pop()
        index = self.cursor
        self.cursor += 1
        self._waiting[index] = None
        return index

    def give_back(self, index: Index) -> None:
        """The group was not finished, and is to be sampled again."""
        self._again = sorted((*self._again, index), reverse=True)
        self._leave()

    def finish(self, group: Group) -> None:
        """The group waits to be trained on, if it is of use."""
        index = int(group.id)
        assert index in self._waiting and self._waiting[index] is None, f"group {index} was finished, but not asked for"
        discarded = sum(one.num_discarded for one in group.trajectories)
        self._count(generated=group.num_sampled + discarded, discarded=discarded)
        most = _MOST_FILTERED * self._size
        if self._filter and not group.informative and self._filtered_in_a_row < most:
            self._filtered_in_a_row += 1
            self._filtered.add(index)
            self._count(filtered=group.num_sampled)
            del self._waiting[index]
            self._leave()
        else:
            self._filtered_in_a_row = 0 if group.informative else self._filtered_in_a_row
            self._count(buffered=group.num_sampled)
            self._waiting[index] = group
            self.num_finished += 1
            self._news.append(index)
        self._arrived.set()

    async def take(self) -> tuple[Group, ...]:
        """The groups of the next update, in the order of their prompts, once there are enough."""
        while (chosen := self._choose()) is None:
            self._arrived.clear()
            await self._arrived.wait()
        update = len(self._trained)
        for group in chosen:
            staleness = update - (update if group.oldest_version is None else group.oldest_version)
            if not 0 <= staleness <= self._max_staleness:
                raise TooStale(f"group `{group.id}` is {staleness} versions old in update {update}, at most "
                               f"{self._max_staleness} are allowed")  # fmt: skip
            del self._waiting[int(group.id)]
            self.num_finished -= 1
            self._count(buffered=-group.num_sampled, trained=group.num_sampled)
        self._trained.append(tuple(int(group.id) for group in chosen))
        self._held.append(len(chosen))
        if not self._pace:
            self._free(update)
        return tuple(chosen)

    def release(self, version: int) -> None:
        """The weights of `version` are live in every generator: free the places of the groups that made them."""
        for update in range(self._live, version):
            self._free(update)
        self._live = version

    def state(self, evaluated: int = -1) -> RunState:
        """All that is here, between two updates."""
        unfinished = tuple(index for index, group in self._waiting.items() if group is None)
        return RunState(
            update=len(self._trained),
            cursor=self.cursor,
            unfinished=unfinished,
            finished=tuple(group for group in self._waiting.values() if group is not None),
            ledger=Ledger(
                trained=tuple(self._trained),
                filtered=tuple(sorted(self._filtered)),
                dropped=tuple(sorted(self._dropped)),
            ),
            tokens=self.tokens,
            filtered_in_a_row=self._filtered_in_a_row,
            evaluated=evaluated,
        )

    def _choose(self) -> list[Group] | None:
        if not self._pace:
            self._drop_stale()
        # Asked whenever a group arrives, of which there may be thousands: most answers must be found without a search.
        if self.num_finished < self._size or (self._missing is not None and self._is_sampled(self._missing)):
            return None
        self._missing = None
        if not self._pace:
            return list(islice((group for group in self._waiting.values() if group is not None), self._size))
        chosen: list[Group] = []
        for index, group in islice(self._waiting.items(), self._size):
            if group is None:
                self._missing = index
                return None
            chosen.append(group)
        return chosen

    def _is_sampled(self, index: Index) -> bool:
        return index in self._waiting and self._waiting[index] is None

    def _drop_stale(self) -> None:
        oldest_allowed = len(self._trained) - self._max_staleness
        new, self._news = self._news, []
        if self._looked_at != len(self._trained):
            self._looked_at = len(self._trained)
            new = list(self._waiting)
        for index in new:
            group = self._waiting.get(index)
            if group is not None and group.oldest_version is not None and group.oldest_version < oldest_allowed:
                del self._waiting[index]
                self.num_finished -= 1
                self._dropped.add(index)
                self._count(buffered=-group.num_sampled, dropped=group.num_sampled)
                self._leave()

    def _leave(self) -> None:
        """A group goes, and another is wanted in its place."""
        self._places.release()
        self._wanted.release()

    def _free(self, update: int) -> None:
        for _ in range(self._held[update]):
            self._places.release()
        self._held[update] = 0

    def _count(self, **changes: int) -> None:
        self.tokens = self.tokens.model_copy(
            update={name: getattr(self.tokens, name) + change for name, change in changes.items()}
        )
