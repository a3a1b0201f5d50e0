#pragma once
// The nccl backend: collectives of device memory over NCCL, all others over the communicator it is
// made over.

#include <memory>

#include "lshmoe/comm/communicator.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

/// Wraps `control`, which brings NCCL's ids around and does the collectives of host memory. Local:
/// NCCL's communicator is made by the first collective of device memory, on the CUDA device that is
/// current then and for good. Each rank needs a GPU of its own: NCCL refuses two ranks on one.
/// Communicators split from it use NCCL too.
///
/// Reproducible: NCCL says nothing about the order in which its reductions add, so none is used.
/// all_reduce of device memory is two exchanges of slices by send and receive with a sum in rank
/// order between, the bits that the mpi backend gives; its scratch memory is 64 MiB and a little at
/// most. Exchanges and broadcasts only move bytes.
///
/// Every wait looks for NCCL's asynchronous errors, and has the deadline of `control`, for the
/// whole collective. After an error NCCL's communicator is aborted, the error names the peers of
/// the collective (NCCL does not say which of them is missing), and this communicator is dead for
/// device memory.
/// Throws NotConfigured in a build without NCCL or CUDA.
[[nodiscard]] std::shared_ptr<Communicator> make_nccl_communicator(
    std::shared_ptr<Communicator> control);

/// Whether this build has NCCL.
[[nodiscard]] bool nccl_configured();

}  // namespace lshmoe
