#!/usr/bin/env bash
# Installs Debian packages: apt.sh PACKAGE... With $APT_SNAPSHOT (such as 20260101T000000Z) from the archive of that moment.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive

get() { apt-get -o Acquire::Retries=3 -o Dpkg::Use-Pty=0 -qq "${options[@]}" "$@"; }

distribution=$(. /etc/os-release && echo "$ID")
options=()
if [[ -n ${APT_SNAPSHOT:-} && $distribution == ubuntu ]]; then
  # The service of snapshots is reached by https, for which the base may have no certificates yet.
  if [[ ! -e /etc/ssl/certs/ca-certificates.crt ]]; then
    get update
    get install --no-install-recommends ca-certificates
  fi
  # NVIDIA's own repository has no snapshots, and what comes from it is in the base already.
  find /etc/apt -name 'cuda*.list' -exec \
    sed -i -E 's/^deb \[/deb [snapshot=no /; s/^deb (http)/deb [snapshot=no] \1/' {} +
  options=(--snapshot "$APT_SNAPSHOT")
elif [[ -n ${APT_SNAPSHOT:-} ]]; then
  find /etc/apt -type f '(' -name '*.list' -o -name '*.sources' ')' -exec sed -i -E \
    "s#https?://[^ ]*/(debian(-security)?)/?( |\$)#http://snapshot.debian.org/archive/\1/$APT_SNAPSHOT\3#" {} +
  options=(-o Acquire::Check-Valid-Until=false)
fi
get update
get install --no-install-recommends "$@" >/dev/null
apt-get clean
rm -rf /var/lib/apt/lists/*
