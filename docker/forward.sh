#!/usr/bin/env bash
# usage: docker/forward.sh COMMAND…     in a container without a terminal, by docker/run.sh
# Runs the command in a process group of its own, passes it the signals that docker sends, and exits as it does.
set -uo pipefail
set -m
"$@" &
group=$!
for signal in HUP INT QUIT TERM; do
  # shellcheck disable=SC2064  # both are known now
  trap "again=yes; kill -$signal -- -$group 2>/dev/null" "$signal"
done
# A signal that is trapped ends wait, not the command.
again=yes
while [[ -n $again ]]; do
  again=''
  wait "$group"
  status=$?
done
exit "$status"
