# shellcheck shell=bash
# Sourced by the scripts here: places, messages, the environment of mpirun, the build.

LSHMOE_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export LSHMOE_VENV=${LSHMOE_VENV:-$LSHMOE_ROOT/.venv}
LSHMOE_PRESET=${LSHMOE_PRESET:-release}
LSHMOE_BUILD=$LSHMOE_ROOT/build/$LSHMOE_PRESET

say() { printf 'lshmoe: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# Ranks of one machine: more ranks than cores are allowed, none is pinned to a core, waiting ranks
# yield, and each computes with one thread. What the caller has set stays.
mpi_environment() {
  export OMPI_MCA_rmaps_base_oversubscribe=${OMPI_MCA_rmaps_base_oversubscribe:-1}
  export OMPI_MCA_hwloc_base_binding_policy=${OMPI_MCA_hwloc_base_binding_policy:-none}
  export OMPI_MCA_mpi_yield_when_idle=${OMPI_MCA_mpi_yield_when_idle:-1}
  # Shared-memory copies by another process's address need a right that containers often lack.
  export OMPI_MCA_btl_vader_single_copy_mechanism=${OMPI_MCA_btl_vader_single_copy_mechanism:-none}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  # mpirun wants ssh even for ranks of this machine alone, and many containers have none. A command
  # that fails serves for those; ranks elsewhere fail at once, as they would without it.
  if [[ ! -x $(command -v ssh || command -v rsh) ]]; then
    export OMPI_MCA_plm_rsh_agent=${OMPI_MCA_plm_rsh_agent:-false}
  fi
  if ((EUID == 0)); then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  fi
}

# build TARGET...: configures when that was not done yet, and builds.
build() {
  if [[ ! -f "$LSHMOE_BUILD/build.ninja" ]]; then
    say "configuring (preset $LSHMOE_PRESET)"
    (cd "$LSHMOE_ROOT" && cmake --preset "$LSHMOE_PRESET")
  fi
  say "building"
  cmake --build "$LSHMOE_BUILD" --target "$@"
}
