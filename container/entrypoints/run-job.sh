#!/usr/bin/env bash
# Runs a program in the Spack environment of the current folder, if there is one: run-job.sh PROGRAM [ARGUMENT...]
set -euo pipefail
# shellcheck source=container/entrypoints/_common.sh
source "${BASH_SOURCE[0]%/*}/_common.sh"

if (($# == 0)); then
  warn 'got no program to run'
  exit 2
fi
load_secrets
add_cuda_paths
has_environment=false
if [[ -e spack.yaml || -e spack.lock ]]; then has_environment=true; fi
if source_spack; then
  if $has_environment; then
    set +u
    spack env activate . || { warn "the Spack environment in $PWD cannot be activated"; exit 1; }
    set -u
  fi
elif $has_environment; then
  warn "this image has no Spack; the environment in $PWD is not activated"
fi
exec "$@"
