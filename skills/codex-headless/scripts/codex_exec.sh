#!/usr/bin/env bash
# Runs Codex once without a terminal; its events go to stdout and, as JSON lines, to a log of their own.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: codex_exec.sh --prompt TEXT [OPTION]...

  --prompt TEXT     what Codex shall do (required)
  --model NAME      model (o4-mini)
  --workdir DIR     folder Codex works in (.)
  --output FILE     write Codex's last message to FILE
  --sandbox MODE    read-only, workspace-write or danger-full-access (workspace-write)
  --timeout SECONDS end Codex after this time (7200)
  -h, --help        show this

The log is logs/codex-<date>-<time>-<pid>.jsonl beside this skill, or in the folder $CODEX_LOG_DIR.
Exit code: Codex's own; 2 for wrong usage, 124 when the time was over, 127 without Codex.
USAGE
}

fail() {
  printf 'error: %s\n\nhint: %s\n' "$1" "$2" >&2
  exit "${3:-2}"
}

prompt='' model=o4-mini workdir=. output='' sandbox=workspace-write limit_s=7200
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --*=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      continue
      ;;
    --prompt | --model | --workdir | --output | --sandbox | --timeout)
      (($# > 1)) || fail "option \`$1\` has no value" 'codex_exec.sh --help'
      ;;
    *) fail "unknown argument \`$1\`" 'codex_exec.sh --help' ;;
  esac
  case $1 in
    --prompt) prompt=$2 ;;
    --model) model=$2 ;;
    --workdir) workdir=$2 ;;
    --output) output=$2 ;;
    --sandbox) sandbox=$2 ;;
    --timeout) limit_s=$2 ;;
  esac
  shift 2
done
[[ -n $prompt ]] || fail 'there is no prompt' "--prompt 'What does this repository do?'"
[[ -d $workdir ]] || fail "\`$workdir\` is not a folder" '--workdir DIR'
[[ $limit_s =~ ^[1-9][0-9]*$ ]] || fail "\`--timeout\` is \`$limit_s\`, wanted seconds" '--timeout 600'
case $sandbox in
  read-only | workspace-write | danger-full-access) ;;
  *) fail "\`--sandbox\` is \`$sandbox\`" 'wanted read-only, workspace-write or danger-full-access' ;;
esac
command -v codex >/dev/null || fail 'codex is not on PATH' 'npm install --global @openai/codex' 127

arguments=(exec)
if [[ $sandbox == workspace-write ]]; then
  # Newer versions have no such option any more; in older ones it would overrule every other sandbox.
  help=$(timeout 30 codex exec --help 2>/dev/null </dev/null || true)
  [[ $help == *--sandbox* && $help != *--full-auto* ]] || arguments+=(--full-auto)
fi
arguments+=(--json --model "$model" --cd "$workdir" --sandbox "$sandbox")
[[ -z $output ]] || arguments+=(--output-last-message "$output")

folder=${CODEX_LOG_DIR:-$(dirname "${BASH_SOURCE[0]}")/../logs}
mkdir -p "$folder"
log=$(cd "$folder" && pwd)/codex-$(date +%Y%m%d-%H%M%S)-$$.jsonl
printf 'log: %s\n' "$log" >&2

exec 3> >(exec tee -- "$log")
tee_pid=$!
# Codex would wait for more of the prompt on a stdin that stays open.
timeout --kill-after=10 "$limit_s" codex "${arguments[@]}" -- "$prompt" </dev/null >&3 3>&- &
codex_pid=$!
exec 3>&-
# Whoever ends this script ends Codex.
trap 'kill -TERM "$codex_pid" 2>/dev/null || true' INT TERM HUP
while
  code=0
  wait "$codex_pid" || code=$?
  kill -0 "$codex_pid" 2>/dev/null
do :; done
wait "$tee_pid" || true
exit "$code"
