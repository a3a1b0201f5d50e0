#!/usr/bin/env bash
# Starts a job that ends badly and checks how: exit code, time, and what is said about it.
#
#   victims.sh CASE VICTIM_PROGRAM MPIEXEC
set -uo pipefail
readonly name=$1 victim=$2 mpiexec=$3
readonly out=$(mktemp)
trap 'rm -f "$out"' EXIT

# launch COMMAND...: its output in $out, its exit code in $code, its seconds in $seconds. The time-out
# is far above the victim's own of 2 s: reaching it is the hang that must not be.
launch() {
  local start=$SECONDS
  timeout --kill-after=5 30 "$@" >"$out" 2>&1
  code=$?
  seconds=$((SECONDS - start))
  sed 's/^/  | /' "$out"
  echo "exit code $code after $seconds s"
}
fail() {
  echo "FAILED: $*"
  exit 1
}
ends_well() { [[ $code -eq 0 ]] || fail "exit code $code instead of 0"; }
ends_badly() {
  [[ $code -ne 0 ]] || fail "exit code 0 of a job that failed"
  [[ $code -ne 124 && $code -ne 137 || $seconds -lt 25 ]] || fail "the job hung"
  [[ $seconds -le 12 ]] || fail "took $seconds s to end"
  ! grep -q "^finished" "$out" || [[ $name == frozen_at_end ]] || fail "the job says it finished"
}
says() { grep -Eq -- "$1" "$out" || fail "nobody says: $1"; }
says_not() { ! grep -Eq -- "$1" "$out" || fail "somebody says: $1"; }

# A launcher around this script, as on a cluster, must not be taken for the victim's.
unset OMPI_COMM_WORLD_SIZE PMIX_RANK PMI_RANK PMI_SIZE SLURM_NTASKS

case $name in
  alone)
    launch "$victim" finish
    ends_well && says "finished: 1 ranks on self"
    ;;
  slurm) # four tasks that know nothing of each other
    SLURM_NTASKS=4 launch "$victim" finish
    ends_badly && says "SLURM_NTASKS is 4 but this process is alone .* start with mpirun"
    ;;
  slurm_mpirun) # one rank on purpose, in a job of four tasks
    SLURM_NTASKS=4 launch "$mpiexec" -n 1 "$victim" finish
    ends_well && says "finished: 1 ranks on mpi"
    ;;
  throw_alone)
    launch "$victim" throw
    ends_badly && says "the victim's own error$" && says_not "second line"
    ;;
  throw)
    launch "$mpiexec" -n 4 "$victim" throw
    ends_badly && says "rank 2.*the victim's own error$" && says_not "second line"
    ;;
  throw_uncaught)
    launch "$mpiexec" -n 4 "$victim" unwind
    ends_badly && says "rank 2.*an exception ends this rank"
    ;;
  killed) # mpirun sees it and ends the others
    launch "$mpiexec" -n 4 "$victim" killed
    ends_badly && says "rank 2 .*signal 9"
    ;;
  killed_unseen)
    # mpirun told to let the others live (it returns 0 then): they must find out, and end, themselves.
    launch "$mpiexec" --enable-recovery -n 4 \
      sh -c '"$0" "$@"; echo "rank $OMPI_COMM_WORLD_RANK exited with $?"' "$victim" killed
    [[ $seconds -le 12 ]] || fail "took $seconds s to end"
    for rank in 0 1 3; do says "rank $rank exited with 1$"; done
    says "no answer for 2 s in all_to_all_v for dispatch on 'world'.*rank 2 on [^ ]+ \(has not come"
    ;;
  frozen)
    launch "$mpiexec" -n 4 "$victim" frozen
    ends_badly && says "no answer for 2 s in all_to_all_v for dispatch on 'world'.*rank 2 on [^ ]+ \(has not come"
    says "this rank sends 300000 B \[100000, 100000, 100000\]"
    ;;
  frozen_at_end)
    launch "$mpiexec" -n 4 "$victim" frozen_at_end
    ends_badly && says "barrier.*rank 2 on [^ ]+ \(has not come.* at the end of the job"
    ;;
  order_mismatch)
    launch "$mpiexec" -n 4 "$victim" order
    ends_badly && says "barrier for control" && says "all_to_all_v for dispatch"
    ;;
  *) fail "no such case: $name" ;;
esac
echo "as it should be"
