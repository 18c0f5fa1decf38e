#!/usr/bin/env bash
# Runs a program, or an interactive shell when none is given, with the Spack environment and CUDA on the path.
set -euo pipefail
# shellcheck source=container/entrypoints/_common.sh
source "${BASH_SOURCE[0]%/*}/_common.sh"

load_secrets
add_cuda_paths
if (($# == 0)); then
  # What is defined here would not survive `exec`; bash reads that file instead of ~/.bashrc.
  exec bash --rcfile "$ENTRYPOINTS/_interactive.sh" -i
fi
source_spack || true
if [[ -n ${SYGALDRY_SPACK_ENVIRONMENT:-} ]]; then activate_environment "$SYGALDRY_SPACK_ENVIRONMENT" || true; fi
exec "$@"
