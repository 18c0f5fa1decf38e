#!/usr/bin/env bash
# Puts Spack into /opt/spack_src and its packages into /opt/spack_packages: spack.sh FOLDER
# Each comes from spack_src.tar or spack_packages.tar in FOLDER, else from its repository: $SPACK_VERSION and
# $SPACK_COMMIT, $SPACK_PACKAGES_COMMIT. An empty $SPACK_VERSION is an image without Spack.
set -euo pipefail
given=$1

# The tag says what is wanted, the commit that it is still the same.
clone() {
  local url=$1 ref=$2 commit=$3 goal=$4 got
  command -v git >/dev/null || bash "$given/apt.sh" ca-certificates git
  git init --quiet "$goal"
  git -C "$goal" fetch --quiet --depth 1 "$url" "$ref"
  git -C "$goal" -c advice.detachedHead=false checkout --quiet FETCH_HEAD
  got=$(git -C "$goal" rev-parse HEAD)
  if [[ -n $commit && $got != "$commit" ]]; then
    echo "$ref of $url is $got, wanted $commit" >&2
    exit 1
  fi
}

mkdir -p /opt/spack_src /opt/spack_packages
if [[ -e $given/spack_src.tar ]]; then
  tar -xf "$given/spack_src.tar" -C /opt/spack_src
elif [[ -n ${SPACK_VERSION:-} ]]; then
  clone https://github.com/spack/spack.git "$SPACK_VERSION" "${SPACK_COMMIT:-}" /opt/spack_src
fi
if [[ -e $given/spack_packages.tar ]]; then
  tar -xf "$given/spack_packages.tar" -C /opt/spack_packages
elif [[ -n ${SPACK_VERSION:-} && -n ${SPACK_PACKAGES_COMMIT:-} ]]; then
  clone https://github.com/spack/spack-packages.git "$SPACK_PACKAGES_COMMIT" "$SPACK_PACKAGES_COMMIT" /opt/spack_packages
fi
if [[ -d /opt/spack_packages/repos/spack_repo/builtin && -d /opt/spack_src/etc/spack ]]; then
  printf 'repos:\n  builtin: /opt/spack_packages/repos/spack_repo/builtin\n' >/opt/spack_src/etc/spack/repos.yaml
fi
