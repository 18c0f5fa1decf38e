"""Lengths of samples that are known before anything is sampled, for measurements: the same work in every run."""

import hashlib
from math import exp
from statistics import NormalDist

from pydantic import Field

from rl.types import Frozen


class LengthTail(Frozen):
    """A log-normal distribution: most samples are short, a few are long."""

    median_tokens: int = Field(48, ge=1)
    sigma: float = Field(0.8, ge=0)
    """Of the logarithm: 0 makes all samples equally long."""
    max_tokens: int = Field(192, ge=1)
    """Longer ones are cut here."""

    def length(self, seed: int, group_id: str, sample: int) -> int:
        """Tokens of one sample of a group: the same for the same arguments, whoever asks."""
        digest = hashlib.sha256(f"{seed}/{group_id}/{sample}".encode()).digest()
        share = (int.from_bytes(digest[:8]) + 0.5) / 2**64
        tokens = self.median_tokens * exp(self.sigma * NormalDist().inv_cdf(share))
        return max(1, min(self.max_tokens, round(tokens)))
