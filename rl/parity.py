"""Whether an engine says what its trainer says, after every change of weights.

    trainer's forward pass of a fixed sequence --(published with the weights)--> = engine's forward pass of it?
    engine's own log-probabilities while it samples on from there              --> = engine's forward pass of that?

The first catches weights that did not arrive everywhere, such as a head that still multiplies by its old copy. The
second catches a sampler whose numbers are not those of the model: together they say that a fresh sample's
log-probabilities are the trainer's.
"""

from rl.engine import Engine
from rl.generate import GenerateRequest
from rl.stack import ParityError
from rl.tokenizer import Tokenizer
from rl.weights import Header, largest_difference, probe_tokens

_SAMPLED_TOKENS = 8
_NEVER = r"(?!)"


async def check_parity(engine: Engine, header: Header, tokenizer: Tokenizer, limit: float) -> float:
    """Largest difference in nats. Raises `ParityError` above `limit`."""
    tokens = probe_tokens(tokenizer)
    fixed = largest_difference(header.probe, await engine.score(tokens))
    request = GenerateRequest(
        token_ids=tokens, max_tokens=_SAMPLED_TOKENS, temperature=1, seed=header.version, stop_pattern=_NEVER
    )
    sample = await engine(request)
    rescored = (await engine.score(tokens + sample.token_ids))[-len(sample.token_ids) :]
    sampled = largest_difference(sample.logprobs, rescored)
    if max(fixed, sampled) <= limit:
        return max(fixed, sampled)
    raise ParityError(
        f"after the change to weights of version {header.version}, log-probabilities differ by more than {limit:g}\n"
        f"  trainer and engine, {len(tokens)} fixed tokens: {fixed:.3g}\n"
        f"  engine while it samples and afterwards, {len(sample.token_ids)} tokens: {sampled:.3g}\n\n"
        "hint: a large first number means weights that did not arrive everywhere; a small one, a lower precision: "
        "raise `engine.parity_limit` for an engine that does not compute in float32"
    )
