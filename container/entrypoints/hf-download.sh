#!/usr/bin/env bash
# Downloads from a Hugging Face hub into HF_HOME, laid out as every later look-up expects it; prints the folder:
#   hf-download.sh [--revision REVISION] model ID
#   hf-download.sh [--revision REVISION] dataset ID [CONFIG] [SPLIT]
# A dataset with CONFIG or SPLIT is prepared by `datasets`, else its files are fetched as they are. HF_TOKEN is used.
set -euo pipefail
# shellcheck source=container/entrypoints/_common.sh
source "${BASH_SOURCE[0]%/*}/_common.sh"

usage() {
  warn "$1; wanted: [--revision REVISION] model ID | [--revision REVISION] dataset ID [CONFIG] [SPLIT]"
  exit 2
}

revision=
if [[ ${1:-} == --revision ]]; then
  (($# >= 2)) || usage '--revision has no value'
  revision=$2
  shift 2
fi
case ${1:-} in
  model) (($# == 2)) || usage "model takes one id, got $(($# - 1))" ;;
  dataset) (($# >= 2 && $# <= 4)) || usage "dataset takes an id, a config and a split, got $(($# - 1)) words" ;;
  '') usage 'got nothing to download' ;;
  *) usage "got \`$1\`" ;;
esac

load_secrets
export HF_HOME=${HF_HOME:-/opt/hf_cache} UV_CACHE_DIR=${UV_CACHE_DIR:-/opt/bazel_cache/uv_cache} HF_HUB_DISABLE_TELEMETRY=1
uv=${UV_BIN:-uv}
command -v "$uv" >/dev/null || { warn "there is no uv ($uv)"; exit 1; }

# The cache may be shared by images of different Pythons: an environment for each, made once.
requirements=$ENTRYPOINTS/_hf_download.txt
made_from=$(cat "$requirements" - <<<"$(python3 -c 'import sys; print(sys.base_prefix, sys.version)')" | sha256sum)
venvs=${HF_VENV_DIR:-/opt/bazel_cache/uv_venvs/hf-download}
venv=$venvs/${made_from:0:12}
mkdir -p "$venvs"
exec {lock}>"$venv.lock"
flock --wait 1800 "$lock" || { warn "another process has been making $venv for half an hour"; exit 1; }
if [[ ! -d $venv ]]; then
  rm -rf "$venv.new"
  "$uv" venv --quiet --relocatable --python "$(command -v python3)" "$venv.new"
  "$uv" pip install --quiet --python "$venv.new/bin/python" --require-hashes --requirements "$requirements"
  mv "$venv.new" "$venv"
fi
exec {lock}>&-
exec "$venv/bin/python" -P "$ENTRYPOINTS/_hf_download.py" "$revision" "$@"
