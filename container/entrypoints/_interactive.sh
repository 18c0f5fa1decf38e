# shellcheck shell=bash
# The rcfile of the interactive shell: the user's own settings, then the commands of this container.

for file in /etc/bash.bashrc ~/.bashrc; do
  # shellcheck source=/dev/null
  if [[ -r $file ]]; then source "$file"; fi
done
unset file
# shellcheck source=container/entrypoints/_common.sh
source "${BASH_SOURCE[0]%/*}/_common.sh"
source_spack
set +u

# spack-env-activate [NAME|FOLDER]: put a Spack environment on the path; by default the one of the image or of this folder.
spack-env-activate() {
  local wanted=${1:-${SYGALDRY_SPACK_ENVIRONMENT:-.}} code=0
  activate_environment "$wanted" || code=$?
  set +u
  return "$code"
}

# gpu-test, jax-test: does torch, does JAX compute on every GPU?
gpu-test() { bash "$ENTRYPOINTS/verify-gpu.sh" --frameworks torch "$@"; }
jax-test() { bash "$ENTRYPOINTS/verify-gpu.sh" --frameworks jax "$@"; }

if [[ -n ${SYGALDRY_SPACK_ENVIRONMENT:-} ]]; then spack-env-activate; fi

cat <<BANNER
${SYGALDRY_SHELL_TITLE:-Standard container}${SYGALDRY_IMAGE_LABEL:+ $SYGALDRY_IMAGE_LABEL}${SYGALDRY_PROJECT_ID:+, project $SYGALDRY_PROJECT_ID}
  spack-env-activate [NAME|FOLDER]   put a Spack environment on the path${SPACK_ENV_VIEW:+ (now: ${SPACK_ENV_VIEW##*/})}
  gpu-test, jax-test                 compute on every GPU with torch, with JAX
BANNER
