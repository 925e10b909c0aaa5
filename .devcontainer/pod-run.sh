#!/usr/bin/env bash
# make pod-run: a long target that survives a closed terminal. make pod-run TARGET="batch GRID=ablations BASE=pod"
#
# Output goes to runs/pod.log, the exit code to runs/pod.exit when it has ended. While it is at work, a second call
# starts nothing: the job holds a lock on runs/pod.lock, which ends with it, also when the pod is stopped. A number in
# runs/pod.pid says nothing, since after a stop it may be another process's; it is kept to stop the job by.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p runs
log=runs/pod.log code=runs/pod.exit pid=runs/pod.pid lock=runs/pod.lock
exec 9> "$lock"
# A job that has just written its exit code is about to end: half a second for that.
held=0
flock --wait 0.5 --conflict-exit-code 99 9 || held=$?
case $held in
  0)
    rm -f "$code"
    # A session of its own has no terminal whose end could end it. TARGET's words are make's arguments. make and what it
    # leaves behind do not inherit the lock.
    # shellcheck disable=SC2016,SC2086
    setsid bash -c 'code=$1; shift; make "$@" 9>&-; echo $? > "$code"' pod "$code" ${TARGET:-all} > "$log" 2>&1 < /dev/null &
    echo $! > "$pid"
    echo "started make ${TARGET:-all}: process $!"
    ;;
  99) echo "at work already: process $(cat "$pid")" ;;
  *) echo "FAILED $lock cannot be locked (flock: exit code $held): keep the repository on a file system with locks" >&2; exit 1 ;;
esac
echo "follow it with: tail -f $log    (its exit code will be in $code; stop it with: kill -- -$(cat "$pid"))"
