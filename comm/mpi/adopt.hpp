#pragma once
// A Communicator from an MPI_Comm of the caller: for programs that run MPI themselves.
// The one public header that needs mpi.h; link MPI::MPI_CXX beside lshmoe::lshmoe to use it.

// Without this, Open MPI's removed C++ bindings would have to be linked.
#ifndef OMPI_SKIP_MPICXX
#define OMPI_SKIP_MPICXX 1
#endif
#ifndef MPICH_SKIP_MPICXX
#define MPICH_SKIP_MPICXX 1
#endif
#include <mpi.h>

#include <cstddef>
#include <memory>
#include <string>

#include "lshmoe/comm/communicator.hpp"

namespace lshmoe {

struct AdoptOptions {
  std::string name = "adopted";    ///< for error texts
  double timeout_seconds = 300.0;  ///< see Communicator::timeout_seconds
  std::size_t chunk_bytes = std::size_t{1}
                            << 30;  ///< largest single MPI message, <= INT_MAX; equal on all ranks
};

/// Duplicates `comm`, so that no message of the caller can meet one of ours, and wraps the
/// duplicate; the caller keeps and frees its own. MPI must run at MPI_THREAD_SERIALIZED or above
/// and must not be finalized while the communicator is used. Collective over `comm`.
[[nodiscard]] std::shared_ptr<Communicator> adopt_mpi(MPI_Comm comm, AdoptOptions options = {});

}  // namespace lshmoe
