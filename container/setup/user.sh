#!/usr/bin/env bash
# Makes the user `kvothe` with the host's ids, whatever the base has under them: user.sh UID GID
set -euo pipefail
uid=$1 gid=$2

taken=$(getent passwd "$uid" | cut -d : -f 1 || true)
# A base's ordinary user makes room (Ubuntu's is `ubuntu`); root and services share the id and keep their name.
if [[ -n $taken ]] && ((uid >= 1000 && uid < 60000)); then
  userdel --force "$taken" 2>/dev/null
fi
getent group "$gid" >/dev/null || groupadd --gid "$gid" kvothe
# Without --no-log-init a large id makes a log of many gigabytes.
useradd --non-unique --no-log-init --uid "$uid" --gid "$gid" --home-dir /home/kvothe --create-home --shell /bin/bash \
  kvothe 2>/dev/null
if [[ -d /etc/sudoers.d ]]; then
  # By number: at run time the host's names are mounted over the image's.
  printf '#%s ALL=(ALL) NOPASSWD: ALL\n' "$uid" >/etc/sudoers.d/kvothe
  chmod 440 /etc/sudoers.d/kvothe
fi
# A login shell, such as Ray's cluster launcher uses, begins with the distribution's PATH.
printf 'PATH=%q\n' "$PATH" >/etc/profile.d/sygaldry.sh
for folder in /workspace /opt/spack_store /opt/bazel_cache /opt/hf_cache; do
  install --directory --owner "$uid" --group "$gid" "$folder"
done
