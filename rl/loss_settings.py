"""Which loss a run minimises, as data. Needs no torch."""

from typing import Any, Literal

from pydantic import Field, model_validator

from rl.types import Frozen

LossName = Literal["reinforce", "rloo", "grpo", "truncated_is", "decoupled_ppo", "cispo"]
AdvantageName = Literal["reward", "group_centred", "group_normalised", "leave_one_out"]
MeanName = Literal["token", "sequence", "sum"]

_USUAL: dict[LossName, dict[str, Any]] = {
    "reinforce": {"advantage": "reward", "mean": "sum"},
    "rloo": {"advantage": "leave_one_out", "mean": "sum"},
    "grpo": {"advantage": "group_normalised", "mean": "sequence"},
    "truncated_is": {"advantage": "group_normalised", "mean": "token", "cap": 2.0},
    "decoupled_ppo": {"advantage": "group_normalised", "mean": "token"},
    "cispo": {"advantage": "group_normalised", "mean": "token", "clip_low": 1.0, "clip_high": 4.0},
}


class LossSettings(Frozen):
    """A loss and its numbers. What is not given is as usual for the loss of that name."""

    name: LossName = "decoupled_ppo"
    advantage: AdvantageName = "group_normalised"
    mean: MeanName = "token"
    """What counts the same: all tokens; all sequences; or all sequences, the losses of a sequence's tokens summed."""
    clip_low: float = Field(0.2, ge=0)
    """The ratio is clipped at `1 - clip_low` (in `grpo`, `decoupled_ppo`, `cispo`)."""
    clip_high: float = Field(0.2, ge=0)
    """The ratio is clipped at `1 + clip_high` (in `grpo`, `decoupled_ppo`, `cispo`)."""
    cap: float = Field(5.0, gt=0)
    """The largest importance weight (in `truncated_is`, `decoupled_ppo`)."""
    kl_coefficient: float = Field(0.0, ge=0)
    """Weight of the KL to the reference model; 0 needs no reference model."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {**_USUAL.get(given.get("name", "decoupled_ppo"), {}), **given}
