#!/usr/bin/env bash
# Installs a Spack environment from its lock and makes its view: spack-build.sh [ENVIRONMENT [OPTION...]]
# ENVIRONMENT is a name or a folder, $SYGALDRY_SPACK_ENVIRONMENT or zephyr by default; options are those of `spack install`.
# Ends with 0 only when Spack says so and its database has every root of the lock; with 75 when the store is in use.
set -euo pipefail
# shellcheck source=container/entrypoints/_common.sh
source "${BASH_SOURCE[0]%/*}/_common.sh"
# shellcheck source=container/entrypoints/_spack.sh
source "${BASH_SOURCE[0]%/*}/_spack.sh"

environment=${1:-${SYGALDRY_SPACK_ENVIRONMENT:-zephyr}}
shift || true
load_secrets
add_cuda_paths
require_spack
source_folder=$(environment_folder "$environment")
if [[ ! -f $source_folder/spack.lock ]]; then
  warn "environment $environment has no spack.lock; make one first: orchestrate spack lock $environment"
  exit 1
fi
hold_store "${source_folder##*/}"
folder=$store/environments/${source_folder##*/}
work_copy "$source_folder" "$folder"
cp "$source_folder/spack.lock" "$folder/.built.lock"
# It makes the view too. Without --only-concrete it would lock again whatever the manifest says beyond the lock.
spack -e "$folder" install --only-concrete --show-log-on-error "$@"
spack -e "$folder" python "$ENTRYPOINTS/_missing_roots.py"
# Steps that name the environment look for this: it is there when all of the above went well.
mv "$folder/.built.lock" "$folder/built.lock"
