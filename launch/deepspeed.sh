#!/usr/bin/env bash
# Train on the hosts of a hostfile, through the deepspeed launcher over ssh.
#
#   bash launch/deepspeed.sh HOSTFILE CONFIG [extra train arguments]
#   bash launch/deepspeed.sh hosts.txt configs/quickstart.toml --run-dir runs/a --set train.num_steps=500
#
# HOSTFILE has a line for each host, "NAME slots=N", N the ranks there. Needed: pdsh on this machine, ssh without a
# password to every host, and this directory and the Python environment at the same path on all of them.
#
# Ctrl-C or SIGTERM: the ranks stop after their step and save; the same command goes on from there. A second one
# ends everything at once. Exit code: 0 finished, 130 stopped and saved, 2 bad input, else failed.
#
#   PYTHON        the interpreter (default: python on PATH)
#   MASTER_PORT   where the ranks meet on the first host (default 29500): another one for each run on a host
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: bash launch/deepspeed.sh HOSTFILE CONFIG [extra train arguments]" >&2
  exit 2
fi
hostfile=$1 config=$2
shift 2
python=$(command -v "${PYTHON:-python}") || { echo "error: ${PYTHON:-python}: no such interpreter on PATH" >&2; exit 2; }

fail() { echo "error: $*" >&2; exit 2; }
[ -r "$hostfile" ] || fail "$hostfile: no such hostfile; it has a line 'NAME slots=N' for each host"
command -v pdsh >/dev/null || fail "pdsh is not installed on this machine; on Debian or Ubuntu: apt-get install pdsh"
# deepspeed writes both into a remote command line without quotes.
case "$PWD$python" in *[!A-Za-z0-9_@%+=:,./-]*)
  fail "a special character in $PWD or $python: deepspeed cannot carry that path to other hosts; use a plain one" ;;
esac

# shellcheck source=launch/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# The directory of the run, which says at the end what became of it; a bad configuration ends here, in one line.
run_dir=$("$python" -c '
import argparse, sys
from roformer_dist.config import load_config
parser = argparse.ArgumentParser()
parser.add_argument("--set", action="append", default=[])
parser.add_argument("--run-dir")
options, _ = parser.parse_known_args(sys.argv[2:])
try:
    config = load_config(sys.argv[1], options.set)
except (ValueError, OSError) as error:
    sys.exit("error: " + " ".join(str(error).split()))
print(options.run_dir or "runs/" + config.name)' "$config" "$@") || exit 2

# What a rank is given passes a shell on each host, and pdsh before it, which replaces %n, %h and %u.
quote() {
  local text=${1//%/%%} single="'"
  printf '%s' "'${text//$single/$single\\$single$single}'"
}
escape() { # what double quotes leave active, but not the double quote itself
  local text=${1//%/%%}
  text=${text//\\/\\\\} text=${text//\$/\\\$} text=${text//\`/\\\`}
  printf '%s' "$text"
}
arguments=()
for argument in --config "$config" "$@"; do
  # deepspeed itself puts an argument with a space into double quotes and escapes the double quotes inside.
  if [[ $argument == *" "* ]]; then arguments+=("$(escape "$argument")"); else arguments+=("$(quote "$argument")"); fi
done

# The environment that reaches the ranks: lines NAME=VALUE; deepspeed fails on an empty one and quotes a value with
# special characters, but does not escape what double quotes leave active.
environment=$(mktemp)
trap 'rm -f "$environment"' EXIT
for file in ~/.deepspeed_env .deepspeed_env ${DS_ENV_FILE:+"$DS_ENV_FILE"}; do
  if [ -f "$file" ]; then grep '=' "$file" >>"$environment" || true; fi
done
for name in $ROFORMER_DIST_CARRY; do
  value=${!name:-}
  [ -n "$value" ] || continue
  value=$(escape "$value")
  printf '%s=%s\n' "$name" "${value//\"/\\\"}" >>"$environment"
done

# --force_multi: one host goes through ssh like many, so that quoting and environment are always the same.
# setsid: Ctrl-C must not reach deepspeed, which would end pdsh, and with it the ranks' output, while they save.
DS_ENV_FILE=$environment setsid "$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --force_multi \
  --master_port "${MASTER_PORT:-29500}" --no_local_rank --log_level critical \
  --module roformer_dist.train "${arguments[@]}" </dev/null &
launcher=$!

hosts=$(sed -E 's/#.*//; s/^[[:space:]]+//; /^$/d; s/[[:space:]].*//' "$hostfile" | paste -sd, -)
stops=0
stop() {
  stops=$((stops + 1))
  if [ $stops -gt 1 ]; then kill -TERM "$launcher" 2>/dev/null || true; return; fi
  echo "stopping after this step and saving; once more to end at once" >&2
  # SIGTERM to the ranks of this configuration and user alone, not to deepspeed's own processes. Each
  # character of the path stands for itself.
  local path
  path=$(printf '%s' "$config" | sed 's/[][\.*^$+?(){}|]/\\&/g')
  setsid pdsh -R ssh -w "$hosts" \
    "pkill -TERM -u $(id -u) -f $(quote "^[^ ]*python[^ ]* -u -m roformer_dist[.]train --config $path( |\$)")" \
    >/dev/null 2>&1 || true
}
trap stop INT TERM

code=0
while :; do
  code=0
  wait "$launcher" || code=$?
  kill -0 "$launcher" 2>/dev/null || break # wait also returns when a signal arrives
done

# The launcher's exit code alone proves little: the run's own status file counts.
"$python" -c '
import sys
from pathlib import Path
from roformer_dist.launching.outcome import report_outcome
sys.exit(report_outcome(Path(sys.argv[1]), int(sys.argv[2]), interrupted=sys.argv[3] != "0"))' "$run_dir" "$code" "$stops"
