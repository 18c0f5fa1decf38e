#!/usr/bin/env bash
# Prints what is installed, a line each of name, version, hash and prefix between tabs: _spack-find.sh [ENVIRONMENT]
set -euo pipefail
# shellcheck source=container/entrypoints/_common.sh
source "${BASH_SOURCE[0]%/*}/_common.sh"
# shellcheck source=container/entrypoints/_spack.sh
source "${BASH_SOURCE[0]%/*}/_spack.sh"

load_secrets
require_spack
if (($#)); then
  settings=(-e "$store/environments/$1")
  # An environment that was never built has nothing installed.
  [[ -d $store/environments/$1 ]] || exit 0
else
  mapfile -t settings < <(store_settings)
fi
spack "${settings[@]}" find --format $'{name}\t{version}\t{hash}\t{prefix}'
