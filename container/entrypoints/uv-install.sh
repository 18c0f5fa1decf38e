#!/usr/bin/env bash
# Installs packages into a virtual environment laid over the Spack view, whose torch, JAX and CUDA stay its own:
#   uv-install.sh [--venv FOLDER] REQUIREMENT|OPTION...     FOLDER is .venv; options are those of `uv pip install`
# Exit code 2 for wrong arguments, 1 when it cannot be done or would hide what the view has.
set -euo pipefail
# shellcheck source=container/entrypoints/_common.sh
source "${BASH_SOURCE[0]%/*}/_common.sh"

venv=.venv
if [[ ${1:-} == --venv && $# -ge 2 ]]; then
  venv=$2
  shift 2
fi
if (($# == 0)) || [[ $1 == --venv ]]; then
  warn 'got no package to install; wanted: [--venv FOLDER] REQUIREMENT|OPTION...'
  exit 2
fi
load_secrets
command -v uv >/dev/null || { warn 'there is no uv in this image'; exit 1; }
add_cuda_paths
activate_wanted_environment || exit 1
exec python3 "$ENTRYPOINTS/_uv_install.py" "$venv" "$@"
