#!/usr/bin/env bash
# Runs one of our entrypoints in the standard container: launch_container.sh [--entrypoint NAME] [--] [ARGUMENT...]
# What is not an option is passed to the entrypoint. Settings are SYGALDRY_* variables; `orchestrate container launch`
# is what does the work and has options for all of them.
set -euo pipefail

entrypoint=${SYGALDRY_ENTRYPOINT:-default}
while (($#)); do
  case $1 in
    -e | --entrypoint)
      if (($# < 2)); then
        printf '%s: %s needs the name of an entrypoint\n' "${0##*/}" "$1" >&2
        exit 2
      fi
      entrypoint=$2
      shift 2
      ;;
    --entrypoint=*)
      entrypoint=${1#*=}
      shift
      ;;
    --)
      shift
      break
      ;;
    *) break ;;
  esac
done

repository=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
orchestrate=$repository/.venv/bin/orchestrate
if [[ ! -x $orchestrate ]]; then
  orchestrate=$(command -v orchestrate) || {
    printf '%s: there is no orchestrate on PATH and no %s/.venv; run make setup\n' "${0##*/}" "$repository" >&2
    exit 3
  }
fi
exec "$orchestrate" container launch --entrypoint "$entrypoint" -- "$@"
