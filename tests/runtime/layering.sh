#!/usr/bin/env bash
# Includes run one way: runtime <- kernels <- comm <- compress <- moe <- launch. Also: public headers
# need no MPI, NCCL or CUDA header, nothing below compress sees torch, and a header that names an
# exception brings it.
#
#   layering.sh SOURCE_TREE          lists what breaks a rule; exit code 1 if anything does
#   layering.sh --self-test          that each rule finds its breach
set -uo pipefail

readonly layers=(runtime kernels comm compress moe launch)

# files FOLDER PATTERN...: the sources of a folder of the tree, one a line
files() {
  local folder=$1 names=()
  shift
  for pattern in "$@"; do names+=(-o -name "$pattern"); done
  find "$tree/$folder" -type f \( "${names[@]:1}" \) 2>/dev/null | sort
}
# forbid WHY REGEX FILE...: every line of the files that includes something matching REGEX
forbid() {
  local why=$1 regex=$2
  shift 2
  [[ $# -gt 0 ]] || return 0
  local found
  found=$(grep -HnE "^[[:space:]]*#[[:space:]]*include[[:space:]]*[<\"]($regex)" "$@") || return 0
  sed "s|^$tree/||; s|\$|   <- $why|" <<<"$found"
  broken=1
}

check() {
  tree=$1 broken=0
  local below="" all headers lower i
  for ((i = ${#layers[@]} - 1; i >= 0; --i)); do
    mapfile -t all < <(files "${layers[i]}" '*.hpp' '*.cpp' '*.cu' '*.cuh')
    # `below` collects the folders above this one.
    [[ -z $below ]] || forbid "${layers[i]} is below that folder" "lshmoe/($below)/" "${all[@]}"
    below+="${below:+|}${layers[i]}"
  done

  mapfile -t headers < <(for layer in "${layers[@]}"; do files "$layer" '*.hpp'; done |
    grep -v '/comm/mpi/adopt\.hpp$')
  forbid "only comm/mpi/adopt.hpp may" 'mpi\.h' "${headers[@]}"
  forbid "no public header may" '(nccl|cuda|cuda_runtime|cuda_runtime_api|cublas_v2)\.h' "${headers[@]}"

  local found
  found=$(grep -lE '\b(InvalidArgument|CommError|CudaError|NotConfigured)\b|[Tt]hrows (Error|Timeout)\b' \
    "${headers[@]}" /dev/null | grep -v '/runtime/error\.hpp$' |
    xargs -r grep -L '#include "lshmoe/runtime/error.hpp"')
  if [[ -n $found ]]; then
    sed "s|^$tree/||; s|\$|   <- names an exception without including runtime/error.hpp|" <<<"$found"
    broken=1
  fi

  mapfile -t lower < <(for layer in runtime kernels comm; do
    files "$layer" '*.hpp' '*.cpp' '*.cu' '*.cuh'
  done | grep -vE '/runtime/(trace\.cpp|cmake/pch\.cpp)$')
  forbid "no torch below compress" '(torch|ATen|c10)/' "${lower[@]}"

  mapfile -t all < <(for layer in "${layers[@]}"; do
    files "$layer" '*.hpp' '*.cpp' '*.cu' '*.cuh'
  done | grep -v '/comm/mpi/')
  forbid "MPI belongs to comm/mpi" '(mpi\.h|lshmoe/comm/mpi/(adopt|transport)\.hpp)' "${all[@]}"
  return $broken
}

# breach PATH INCLUDE [TEXT]: a tree with these lines must be refused
breach() {
  local root
  root=$(mktemp -d)
  mkdir -p "$root/$(dirname "$1")"
  printf '#include %s\n%s\n' "$2" "${3:-}" >"$root/$1"
  if check "$root" >/dev/null; then
    echo "not found: $2 in $1"
    missed=1
  fi
  rm -r "$root"
}
allowed() {
  local root
  root=$(mktemp -d)
  mkdir -p "$root/$(dirname "$1")"
  printf '#include %s\n%s\n' "$2" "${3:-}" >"$root/$1"
  if ! check "$root"; then
    echo "wrongly refused: $2 in $1"
    missed=1
  fi
  rm -r "$root"
}

if [[ ${1:-} == --self-test ]]; then
  missed=0
  breach runtime/a.hpp '"lshmoe/kernels/a.hpp"'
  breach comm/a.cpp '"lshmoe/compress/codec.hpp"'
  breach kernels/cuda/a.cu '"lshmoe/comm/communicator.hpp"'
  breach moe/a.cpp '"lshmoe/launch/a.hpp"'
  breach comm/communicator.hpp '<mpi.h>'
  breach moe/a.cpp '<mpi.h>'
  breach moe/a.cpp '"lshmoe/comm/mpi/adopt.hpp"'
  breach compress/a.hpp '<cuda_runtime.h>'
  breach comm/nccl/a.hpp '<nccl.h>'
  breach comm/a.cpp '<torch/torch.h>'
  breach runtime/trace.hpp '<ATen/ATen.h>'
  breach kernels/cpu/a.cpp '"c10/util/BFloat16.h"'
  breach moe/a.hpp '<string>' '/// Throws InvalidArgument.'
  breach runtime/a.hpp '<string>' '/// Throws Error when that fails.'
  allowed moe/a.hpp '"lshmoe/runtime/error.hpp"' '/// Throws InvalidArgument.'
  allowed moe/a.hpp '<string>' '/// Errors are relative.'
  allowed comm/mpi/adopt.hpp '<mpi.h>'
  allowed runtime/trace.cpp '<torch/torch.h>'
  allowed compress/a.hpp '<torch/torch.h>'
  allowed comm/session.cpp '"lshmoe/comm/mpi/job.hpp"'
  exit $missed
fi
check "${1:?the source tree}" || exit 1
echo "includes run one way"
