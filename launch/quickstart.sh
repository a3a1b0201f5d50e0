#!/usr/bin/env bash
# Installs what is missing, builds, and trains a small mixture-of-experts language model on 4 ranks of
# this machine with its all-to-all compressed.
#
#   launch/quickstart.sh [lshmoe-train options]    e.g. --compress none, --steps 300
#   launch/quickstart.sh --config FILE             FILE in place of launch/quickstart.ini
#
# Ctrl-C ends the training cleanly after the current step, with the summary; a second one at once.
#   LSHMOE_RANKS   number of ranks (default 4)
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

"$LSHMOE_ROOT/launch/setup.sh"
build lshmoe-train >&2
mpi_environment
metrics=$LSHMOE_ROOT/build/quickstart/metrics.jsonl
if [[ " $* " == *" --metrics"* || " $* " == *" --help "* || " $* " == *" -h "* ]]; then
  metrics=
else
  mkdir -p "${metrics%/*}"
  set -- --metrics "$metrics" "$@"
fi
[[ " $* " == *" --config"[\ =]* ]] || set -- --config "$LSHMOE_ROOT/launch/quickstart.ini" "$@"

# mpirun turns a Ctrl-C into SIGTERM and, a second later, SIGKILL for every rank. In a session of its own
# it does not see the terminal's; it gets SIGUSR1 instead and forwards that: "stop after this step".
setsid mpirun -n "${LSHMOE_RANKS:-4}" "$LSHMOE_BUILD/launch/lshmoe-train" "$@" </dev/null &
mpirun_pid=$!
signals=0
# shellcheck disable=SC2317  # the trap calls it
stop() {
  ((++signals))
  if ((signals == 1)); then
    say "stopping after this step (again: at once)"
    kill -USR1 "$mpirun_pid" 2>/dev/null || true
  else
    kill -TERM "$mpirun_pid" 2>/dev/null || true
  fi
}
trap stop INT TERM HUP
# A trap makes wait return early; the next one gives mpirun's own status, even if it has ended by then.
seen=-1
while ((seen != signals)); do
  seen=$signals status=0
  wait "$mpirun_pid" || status=$?
done
# 128 + SIGUSR1: a rank got it before it listens for it.
((status != 138)) || say "stopped before the first step"
[[ $status -ne 0 || -z $metrics ]] || say "metrics: $metrics"
exit "$status"
