#!/usr/bin/env bash
# Checks that torch and JAX compute on the GPUs: verify-gpu.sh [--json] [--report FILE] [--frameworks torch,jax]
# Exit code 0 when they do, 1 when there is no GPU or one of them cannot use it, 2 for wrong arguments.
set -euo pipefail
# shellcheck source=container/entrypoints/_common.sh
source "${BASH_SOURCE[0]%/*}/_common.sh"

load_secrets
add_cuda_paths
problem=()
# Told in the report as well, so the check goes on.
activate_wanted_environment || problem=(--problem "the Spack environment ${SYGALDRY_SPACK_ENVIRONMENT:-of this folder} cannot be activated")
if ! command -v python3 >/dev/null; then
  warn 'there is no python3 to check with'
  exit 1
fi
exec python3 "$ENTRYPOINTS/_verify_gpu.py" "${problem[@]}" "$@"
