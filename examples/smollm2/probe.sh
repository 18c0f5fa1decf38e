#!/usr/bin/env bash
# Says whether a GPU can be used here: the output `gpus` is 0 or 1.
set -euo pipefail
gpus=0
if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU'; then
  gpus=1
fi
echo "gpus: $gpus"
echo "{\"gpus\": $gpus}" >>"$STEP_OUTPUTS"
