#!/usr/bin/env bash
# Installs specs into the store, then opens a shell if somebody types: spack-install.sh SPEC...
set -euo pipefail
# shellcheck source=container/entrypoints/_common.sh
source "${BASH_SOURCE[0]%/*}/_common.sh"
# shellcheck source=container/entrypoints/_spack.sh
source "${BASH_SOURCE[0]%/*}/_spack.sh"

if (($# == 0)); then
  warn 'got no spec to install'
  exit 2
fi
load_secrets
add_cuda_paths
require_spack
mapfile -t settings < <(store_settings)
(
  hold_store "$*"
  spack "${settings[@]}" install "$@"
)
if [[ -t 0 && -t 1 ]]; then
  exec bash --rcfile "$ENTRYPOINTS/_interactive.sh" -i
fi
