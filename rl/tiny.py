"""The model `tiny`: a Llama of 1.1 million parameters that knows the task language and little else.

    new_tiny(seed) -> warm_start (oracle traces) -> folder in the cache

It is made on the user's machine; the same seed on the same machine gives the same weights.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rl.tokenizer import TinyTokenizer
from rl.warm_start import RECIPE, WarmStart, warm_start

if TYPE_CHECKING:
    import torch

LONGEST = 2048
"""Tokens."""
_TIMEOUT_S = 3600
"""On two cores that have nothing else to do it takes a minute."""
_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": LONGEST,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}


def tiny_name(seed: int, recipe: WarmStart = RECIPE) -> str:
    """Of the folder in the cache: another recipe, vocabulary or shape is another model."""
    made_of = json.dumps([_SHAPE, TinyTokenizer().pieces, recipe.model_dump()], sort_keys=True)
    return f"tiny-{seed}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"


def new_tiny(seed: int) -> "torch.nn.Module":
    """The model with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = TinyTokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **_SHAPE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast("torch.nn.Module", LlamaForCausalLM(config))


def make_tiny(folder: Path, seed: int, recipe: WarmStart = RECIPE) -> None:
    """Write the warm-started model to `folder`."""
    from rl.models import save_model

    model = new_tiny(seed)
    warm_start(model, TinyTokenizer(), seed, recipe)
    save_model(model, TinyTokenizer(), str(folder))


def make_tiny_apart(folder: Path, seed: int) -> None:
    """`make_tiny` in a process of its own, whose threads are always the same, so that its numbers are."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    done = subprocess.run(
        [sys.executable, "-m", "rl.tiny", str(folder), str(seed)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )
    if done.returncode:
        raise RuntimeError(f"the model `tiny` could not be made: {done.stderr.strip()[-1000:]}")


if __name__ == "__main__":
    make_tiny(Path(sys.argv[1]), int(sys.argv[2]))
