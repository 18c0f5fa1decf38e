#!/usr/bin/env bash
# Runs a program, or an interactive shell when none is given, with Spack and CUDA on the path where the image has them.
set -euo pipefail
# shellcheck source=container/entrypoints/_common.sh
source "${BASH_SOURCE[0]%/*}/_common.sh"

load_secrets
add_cuda_paths
source_spack || true
if (($# == 0)); then
  exec bash -i
fi
exec "$@"
