#!/usr/bin/env bash
# make pod-run: a long target that survives a closed terminal. make pod-run TARGET="batch GRID=ablations BASE=pod"
#
# Output goes to runs/pod.log, the exit code to runs/pod.exit when it has ended. While it is at work, a second call
# starts nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p runs
log=runs/pod.log code=runs/pod.exit pid=runs/pod.pid
if [[ -f $pid && ! -f $code ]] && kill -0 "$(cat "$pid")" 2> /dev/null; then
  echo "at work already: process $(cat "$pid")"
else
  rm -f "$code"
  # A session of its own has no terminal whose end could end it. TARGET's words are make's arguments.
  # shellcheck disable=SC2016,SC2086
  setsid bash -c 'code=$1; shift; make "$@"; echo $? > "$code"' pod "$code" ${TARGET:-all} > "$log" 2>&1 < /dev/null &
  echo $! > "$pid"
  echo "started make ${TARGET:-all}: process $!"
fi
echo "follow it with: tail -f $log    (its exit code will be in $code; stop it with: kill -- -$(cat "$pid"))"
