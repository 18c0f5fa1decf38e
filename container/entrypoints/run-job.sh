#!/usr/bin/env bash
# Runs a program, or a command line given as one argument, in the Spack environment that is named by
# SYGALDRY_SPACK_ENVIRONMENT or lies in the current folder: run-job.sh PROGRAM [ARGUMENT...] | run-job.sh 'COMMAND LINE'
set -euo pipefail
# shellcheck source=container/entrypoints/_common.sh
source "${BASH_SOURCE[0]%/*}/_common.sh"

if (($# == 0)); then
  warn 'got no program to run'
  exit 2
fi
load_secrets
add_cuda_paths
source_spack || true
activate_wanted_environment || exit 1
if (($# == 1)) && ! type -P -- "$1" >/dev/null; then
  exec bash -c "$1"
fi
exec "$@"
