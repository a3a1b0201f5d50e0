#pragma once
// Starting and ending MPI, for Session alone; no mpi.h.

#include <memory>

#include "lshmoe/comm/communicator.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::mpi {

/// Initializes MPI at THREAD_SERIALIZED and returns true; false when the program did it before.
/// Throws CommError when MPI cannot be called from more than one thread in turn. Collective.
[[nodiscard]] bool start();
/// MPI_COMM_WORLD as a Communicator. Collective.
[[nodiscard]] std::shared_ptr<Communicator> make_world(double timeout_seconds);
/// MPI_Finalize. Collective, and waits for all ranks without a deadline: call barrier() before it.
void finalize();
/// MPI_Abort of the whole job. Local.
[[noreturn]] void abort(int exit_code);

}  // namespace lshmoe::mpi
