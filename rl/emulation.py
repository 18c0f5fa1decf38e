"""How long an accelerator would take, for runs whose device time is slept: all else in them is real.

    EngineEmulation -> rl.engine_emulated      LearnerEmulation -> rl.learner_emulated

Messages, processes, the loop, the weight store and the bytes in it are those of any run. Light.
"""

from collections.abc import Iterable

from pydantic import Field

from rl.types import Frozen

_GB = 1e9


class EngineEmulation(Frozen):
    """The time of one generator's device."""

    prefill_s_per_token: float = Field(2e-5, ge=0)
    """Of a prompt that does not begin together with an equal one; nothing is sampled meanwhile."""
    decode_s: float = Field(0.01, gt=0)
    """One token for one running sequence."""
    decode_s_per_sequence: float = Field(1e-4, ge=0)
    """What each further sequence adds to a step, which gives a token to every one that runs."""
    reload_s_per_gb: float = Field(0.05, ge=0)
    """Other weights into the device, between two steps."""
    median_tokens: float = Field(64, gt=0)
    """Of a turn that may end by itself; lengths are log-normal."""
    sigma: float = Field(0.8, ge=0)
    """Of the logarithm of these lengths."""

    def step_s(self, num_running: int) -> float:
        """One step of the device."""
        return self.decode_s + self.decode_s_per_sequence * (num_running - 1)

    def prefill_s(self, prompts: Iterable[tuple[int, ...]]) -> float:
        """Of prompts that begin together."""
        return self.prefill_s_per_token * sum(map(len, set(prompts)))

    def reload_s(self, num_bytes: int) -> float:
        """Of weights of this size."""
        return self.reload_s_per_gb * num_bytes / _GB


class LearnerEmulation(Frozen):
    """The time of the trainer's device, and the weights that it sends."""

    update_s: float = Field(0.1, ge=0)
    """Of any update."""
    update_s_per_token: float = Field(1e-4, ge=0)
    """And for each token of its conversations, prompts included; the processes of a learner share them."""
    num_bytes: int = Field(1 << 27, ge=64)
    """Of the weights, which are really published and pulled."""
