#!/usr/bin/env bash
# Starts a job that ends badly and checks how: exit code, time, and what is said about it.
#
#   victims.sh CASE VICTIM_PROGRAM MPIEXEC
set -uo pipefail
readonly name=$1 victim=$2 mpiexec=$3
out=$(mktemp)
readonly out
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
unset OMPI_COMM_WORLD_SIZE PMIX_RANK PMI_RANK PMI_SIZE SLURM_NTASKS MV2_COMM_WORLD_SIZE FLUX_JOB_SIZE \
  FLUX_TASK_RANK PALS_LOCAL_SIZE PALS_RANKID JSM_NAMESPACE_SIZE WORLD_SIZE RANK

case $name in
  alone)
    launch "$victim" finish
    ends_well && says "finished: 1 ranks on self"
    ;;
  slurm_mpirun) # one rank on purpose, in a job of four tasks
    SLURM_NTASKS=4 launch "$mpiexec" -n 1 "$victim" finish
    ends_well && says "finished: 1 ranks on mpi"
    ;;
  other_launchers) # what they set for the second of four processes
    others=(
      "SLURM_NTASKS=4"
      "MV2_COMM_WORLD_SIZE=4 MV2_COMM_WORLD_RANK=1"
      "FLUX_JOB_SIZE=4 FLUX_TASK_RANK=1"
      "FLUX_JOB_SIZE=4 FLUX_TASK_RANK=1 PMI_SIZE=4 PMI_RANK=1"
      "PALS_LOCAL_SIZE=4 PALS_RANKID=1 PMI_SIZE=4 PMI_RANK=1"
      "PALS_RANKID=1 PMIX_RANK=1"
      "JSM_NAMESPACE_SIZE=4 JSM_NAMESPACE_RANK=1"
      "OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=1"
      "PMI_SIZE=4 PMI_RANK=1"
      "PMI_RANK=1"
      "PMIX_RANK=1"
      "WORLD_SIZE=4 RANK=1 LOCAL_RANK=1"
    )
    for other in "${others[@]}"; do
      # shellcheck disable=SC2086  # several words
      launch env $other "$victim" finish
      first=${other%% *}
      ends_badly && says "^caught in main: ${first%=*} is ${first#*=} but this process is alone \\(.*\\): start with"
      says ", or unset ${first%=*} for a run of one process$"
    done
    # Jobs that are what those variables say, or whose launcher is this MPI's own.
    # shellcheck disable=SC2048,SC2086
    for ranks in 1 2; do
      launch env ${others[*]} "$mpiexec" -n $ranks "$victim" finish
      ends_well && says "finished: $ranks ranks on mpi"
    done
    launch env WORLD_SIZE=1 RANK=0 SLURM_NTASKS=1 FLUX_JOB_SIZE=1 FLUX_TASK_RANK=0 PALS_LOCAL_SIZE=1 \
      PALS_RANKID=0 JSM_NAMESPACE_SIZE=1 MV2_COMM_WORLD_SIZE=1 "$victim" finish
    ends_well && says "finished: 1 ranks on self"
    launch env PMI_SIZE=1 PMI_RANK=0 PMIX_RANK=0 "$victim" finish
    ends_well && says "finished: 1 ranks on mpi"
    # Not theirs: a name that other things have too, an allocation that Flux started for a shell.
    launch env WORLD_SIZE=4 FLUX_JOB_SIZE=4 "$victim" finish
    ends_well && says "finished: 1 ranks on self"
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
