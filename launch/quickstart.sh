#!/usr/bin/env bash
# Installs what is missing, builds, and trains a small mixture-of-experts language model on 4 ranks of
# this machine with its all-to-all compressed.
#
#   launch/quickstart.sh [lshmoe-train options]    e.g. --compress none, --steps 300
#
# Ctrl-C ends the training cleanly after the current step, with the summary.
#   LSHMOE_RANKS   number of ranks (default 4)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

"$LSHMOE_ROOT/launch/setup.sh"
build lshmoe-train >&2
mpi_environment
out=$LSHMOE_ROOT/build/quickstart
mkdir -p "$out"

# mpirun turns a Ctrl-C into SIGTERM and, a second later, SIGKILL for every rank. In a session of its own
# it does not see the terminal's; it gets SIGUSR1 instead and forwards that: "stop after this step".
setsid mpirun -n "${LSHMOE_RANKS:-4}" "$LSHMOE_BUILD/launch/lshmoe-train" \
  --config "$LSHMOE_ROOT/launch/quickstart.ini" --metrics "$out/metrics.jsonl" "$@" </dev/null &
mpirun_pid=$!
trap 'say "stopping after this step"; kill -USR1 "$mpirun_pid" 2>/dev/null || true' INT TERM
status=0
wait "$mpirun_pid" || status=$?
while kill -0 "$mpirun_pid" 2>/dev/null; do  # wait returns early when a trap ran
  status=0
  wait "$mpirun_pid" || status=$?
done
((status == 0)) && say "metrics: $out/metrics.jsonl"
exit "$status"
