"""What became of every prompt of a run, and of every token: the nouns of its durability, in the order they flow."""

from pydantic import Field

from rl.types import Frozen, Group

Index = int
"""Place of a prompt in the run's `PromptSet`; also its group's id (`group_id`)."""


def group_id(index: Index) -> str:
    """The id of the group of a prompt; ids sort as the indices do."""
    return f"{index:08d}"


class Ledger(Frozen):
    """The fate of every prompt that was asked. No index is in it twice."""

    trained: tuple[tuple[Index, ...], ...] = ()
    """[updates] the prompts of each update, in order."""
    filtered: tuple[Index, ...] = ()
    """Sampled, and left out because all rewards were equal; in ascending order."""
    dropped: tuple[Index, ...] = ()
    """Sampled, and left out because they had become too stale; in ascending order."""


class Tokens(Frozen):
    """Where the sampled tokens went: `generated` is always the sum of the others."""

    generated: int = 0
    """Of all groups that were finished."""
    trained: int = 0
    buffered: int = 0
    """Of groups that wait to be trained on."""
    filtered: int = 0
    dropped: int = 0
    discarded: int = 0
    """Sampled behind the end of a turn."""
    rolled_back: int = 0
    """Of work that was done again, because the trainer was lost after it."""

    @property
    def wasted(self) -> int:
        """Tokens that nothing was or will be learned from."""
        return self.filtered + self.dropped + self.discarded + self.rolled_back


class RunState(Frozen):
    """A run between two updates: all that a checkpoint holds beside the trainer's own files."""

    update: int = Field(0, ge=0)
    """Updates that are done, which is the version of the trainer's weights too."""
    cursor: Index = 0
    """The first prompt that was never asked."""
    unfinished: tuple[Index, ...] = ()
    """Asked, but their group was not finished: they are sampled again."""
    finished: tuple[Group, ...] = ()
    """Finished, and not trained on yet."""
    ledger: Ledger = Ledger()
    tokens: Tokens = Tokens()
    filtered_in_a_row: int = 0
    """Groups that were filtered since the last one that was not."""
    evaluated: int = -1
    """The version that was evaluated last, -1 before the first evaluation."""
