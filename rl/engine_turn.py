"""A turn that an engine samples: its tokens so far, each with its log-probability and the version it came from."""

from rl.generate import Finish, GenerateRequest, Sample
from rl.stop_rule import StopRule
from rl.tokenizer import Tokenizer


class Turn:
    """A request that waits or runs."""

    def __init__(self, request: GenerateRequest, tokenizer: Tokenizer) -> None:
        self.rule = None if request.to_the_end else StopRule(tokenizer, request.stop_pattern)
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []

    def take(self, token: int, logprob: float, version: int) -> bool:
        """One more token; True when the stop rule ends the turn with it."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)
        return self.rule is not None and self.rule.over(token)

    def sample(self, finish: Finish) -> Sample:
        """What there is of it."""
        return Sample(
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            versions=tuple(self.versions),
            finish=finish,
        )
