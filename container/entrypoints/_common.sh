# shellcheck shell=bash
# Functions of all entrypoints; sourced, not run.

# Used by those who source this.
# shellcheck disable=SC2034
ENTRYPOINTS=${BASH_SOURCE[0]%/*}
VIEWS=${SYGALDRY_SPACK_STORE:-/opt/spack_store}/views

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

# activate_environment NAME|FOLDER: a name stands for its view, which is all that a built environment needs; a folder is
# activated by Spack. Fails with a message when that cannot be.
activate_environment() {
  local wanted=$1
  if [[ $wanted != */* && $wanted != . ]]; then
    if [[ -d $VIEWS/$wanted/bin ]]; then
      activate_view "$VIEWS/$wanted"
      return 0
    fi
    warn "the Spack environment \`$wanted\` is not built: there is no $VIEWS/$wanted (orchestrate spack build $wanted)"
    return 1
  fi
  if ! declare -F spack >/dev/null && ! source_spack; then
    warn "this image has no Spack; the environment in $(realpath "$wanted") is not activated"
    return 3
  fi
  set +u
  if ! spack env activate "$wanted"; then
    set -u
    warn "the Spack environment in $(realpath "$wanted") cannot be activated"
    return 1
  fi
  set -u
}

# activate_view FOLDER: what `spack env activate` sets for a view, without starting Spack.
activate_view() {
  local view=$1
  export PATH=$view/bin:$PATH SPACK_ENV_VIEW=$view
  export MANPATH=$view/share/man:$view/man:${MANPATH:-}
  export ACLOCAL_PATH=$view/share/aclocal${ACLOCAL_PATH:+:$ACLOCAL_PATH}
  export CMAKE_PREFIX_PATH=$view${CMAKE_PREFIX_PATH:+:$CMAKE_PREFIX_PATH}
  export PKG_CONFIG_PATH=$view/lib/pkgconfig:$view/lib64/pkgconfig:$view/share/pkgconfig${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}
}

# The environment of a job: the one that is named, else the one in the current folder, else none. Fails as above; an
# image without Spack is no failure, for jobs that only lie beside an environment.
activate_wanted_environment() {
  local wanted=${SYGALDRY_SPACK_ENVIRONMENT:-} code=0
  if [[ -z $wanted ]] && [[ -e spack.yaml || -e spack.lock ]]; then wanted=.; fi
  [[ -n $wanted ]] || return 0
  activate_environment "$wanted" || code=$?
  ((code == 0 || code == 3))
}

add_cuda_paths() {
  local cuda=${CUDA_HOME:-/usr/local/cuda}
  [[ -d $cuda ]] || return 0
  export CUDA_HOME=$cuda PATH=$cuda/bin:$PATH
  export LD_LIBRARY_PATH=$cuda/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
}
