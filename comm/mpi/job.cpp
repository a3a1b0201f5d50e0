#include "lshmoe/comm/mpi/job.hpp"

#include <cstdlib>

#include "lshmoe/comm/mpi/adopt.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::mpi {

bool start() {
  int initialized = 0;
  MPI_Initialized(&initialized);
  int provided = MPI_THREAD_SINGLE;
  if (initialized) {
    MPI_Query_thread(&provided);
  } else if (MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &provided) != MPI_SUCCESS) {
    throw CommError(
        "MPI_Init_thread failed: start the program with the mpirun of the MPI it is "
        "linked with");
  }
  if (provided < MPI_THREAD_SERIALIZED) {
    throw CommError(
        initialized
            ? "the program initialized MPI below MPI_THREAD_SERIALIZED (the backward pass may call "
              "it from another thread): use MPI_Init_thread with MPI_THREAD_SERIALIZED"
            : "this MPI offers no MPI_THREAD_SERIALIZED (the backward pass may call it from "
              "another "
              "thread): build MPI with thread support");
  }
  return !initialized;
}

std::shared_ptr<Communicator> make_world(double timeout_seconds) {
  return adopt_mpi(MPI_COMM_WORLD, {.name = "world", .timeout_seconds = timeout_seconds});
}

void finalize() { MPI_Finalize(); }

void abort(int exit_code) {
  MPI_Abort(MPI_COMM_WORLD, exit_code);
  std::_Exit(exit_code);  // MPI_Abort is not declared noreturn
}

}  // namespace lshmoe::mpi
