# shellcheck shell=bash
# What the entrypoints that run Spack share; sourced after _common.sh, not run.

store=${SYGALDRY_SPACK_STORE:-/opt/spack_store}

# Puts Spack on the path, without its shell functions, and makes the store. Ends the script where there is none.
require_spack() {
  local root
  for root in "${SPACK_ROOT:-/nonexistent}" /opt/spack_src; do
    if [[ -x $root/bin/spack ]]; then
      export SPACK_ROOT=$root PATH=$root/bin:$PATH
      # Clones of package repositories stay with the store.
      export SPACK_USER_CACHE_PATH=${SPACK_USER_CACHE_PATH:-$store/user_cache}
      mkdir -p "$store" || { warn "the store $store cannot be made; SYGALDRY_SPACK_STORE names another"; exit 1; }
      return
    fi
  done
  warn 'there is no Spack here: neither SPACK_ROOT nor /opt/spack_src holds one'
  exit 1
}

# Prints the folder of environment $1: a path, or a name that is looked for where environments are mounted or lie.
environment_folder() {
  local folder
  for folder in "$1" "/opt/sygaldry/environments/$1" "/workspace/spack/$1" "$store/environments/$1"; do
    # A name never means a folder that happens to lie in the current one.
    if [[ $folder == */* && -f $folder/spack.yaml ]]; then
      (cd "$folder" && pwd)
      return
    fi
  done
  warn "there is no Spack environment $1"
  return 1
}

# Copies the environment in folder $1 to folder $2, as this store needs it. Spack writes beside the files of an
# environment, so the original is never given to it.
work_copy() {
  [[ $1 == "$2" ]] && return
  # Not `spack python`, which would first look for the repositories of Spack's own settings.
  PYTHONPATH=$SPACK_ROOT/lib/spack "${SPACK_PYTHON:-python3}" "$ENTRYPOINTS/_work_copy.py" "$1" "$2" "$store"
}

# Spack's options for what an environment would bring along.
store_settings() {
  printf '%s\n' -c "config:install_tree:root:$store" -c "config:build_stage:$store/build_stage" \
    -c "config:source_cache:$store/source_cache" -c "config:misc_cache:$store/misc_cache"
}

# Waits until no other build uses the store; the lock ends with this process. At most $SYGALDRY_SPACK_WAIT_S seconds.
hold_store() {
  local wait_s=${SYGALDRY_SPACK_WAIT_S:-0}
  exec {store_lock}>>"$store/.build-lock"
  flock --wait "$wait_s" "$store_lock" || {
    warn "another build holds the store $store ($(cat "$store/.build-lock.owner" 2>/dev/null || echo unknown)); waited $wait_s s"
    exit 75
  }
  printf '%s on %s since %s\n' "$1" "$(uname -n)" "$(date -u +%FT%TZ)" >"$store/.build-lock.owner"
}
