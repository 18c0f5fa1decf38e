#!/usr/bin/env bash
# Prints the lock that Spack makes of a manifest, and changes nothing: _spack-lock.sh FOLDER [OPTION...]
# Options are those of `spack concretize`. What Spack says goes to stderr.
set -euo pipefail
# shellcheck source=container/entrypoints/_common.sh
source "${BASH_SOURCE[0]%/*}/_common.sh"
# shellcheck source=container/entrypoints/_spack.sh
source "${BASH_SOURCE[0]%/*}/_spack.sh"

load_secrets
require_spack
# A user's own settings must not leak into a lock that others get.
export SPACK_DISABLE_LOCAL_CONFIG=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
folder=$scratch/${1##*/}
work_copy "$1" "$folder"
rm -f "$folder/spack.lock"
shift
spack -e "$folder" concretize --force "$@" >&2
cat "$folder/spack.lock"
