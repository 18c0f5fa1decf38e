# shellcheck shell=bash
# Functions of all entrypoints; sourced, not run.

warn() { printf '%s: %s\n' "${0##*/}" "$1" >&2; }

# Secrets come in a file of NUL-separated NAME=value pairs, so that they are in no argument list and no engine record.
load_secrets() {
  local pair file=/run/sygaldry/secrets
  [[ -r $file ]] || return 0
  while IFS= read -r -d '' pair; do
    export "${pair?}"
  done <"$file"
}

# Spack's shell functions, where the image has Spack. Fails when it has none.
source_spack() {
  local setup
  for setup in "${SPACK_ROOT:-/nonexistent}/share/spack/setup-env.sh" /opt/spack_src/share/spack/setup-env.sh; do
    if [[ -r $setup ]]; then
      # Spack's script reads unset variables.
      set +u
      # shellcheck source=/dev/null
      source "$setup" || { set -u; return 1; }
      set -u
      return 0
    fi
  done
  return 1
}

add_cuda_paths() {
  local cuda=${CUDA_HOME:-/usr/local/cuda}
  [[ -d $cuda ]] || return 0
  export CUDA_HOME=$cuda PATH=$cuda/bin:$PATH
  export LD_LIBRARY_PATH=$cuda/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
}
