#pragma once
// Session: what one process of a job needs before anything else: MPI, its rank, its device.

#include <memory>
#include <string>

#include "lshmoe/comm/communicator.hpp"

namespace lshmoe {

struct SessionOptions {
  double timeout_seconds = 300.0;  ///< longest wait for the peers of one collective
};

/// Owns the process's part in the job. Make one, first thing in main, and let it live until the
/// end.
///
/// Under mpirun or Slurm (OMPI_*, PMIX_* or PMI_* in the environment) it initialises MPI at
/// THREAD_SERIALIZED and finalises it; without them the world is this process alone ("self") and
/// MPI is not touched. SLURM_NTASKS > 1 with a world of one throws CommError. If the destructor
/// runs because an exception unwinds, it aborts the whole job (MPI_Abort): a Finalize would hang
/// there. Nothing else in this library calls MPI_Init, MPI_Finalize or MPI_Abort.
class Session {
 public:
  /// Collective over the job. argc and argv may be null/0; they are not changed.
  explicit Session(int argc = 0, char** argv = nullptr, SessionOptions options = {});
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  /// All ranks of the job. Local. Stays usable as long as this Session lives.
  [[nodiscard]] std::shared_ptr<Communicator> world() const;
  /// Rank among the ranks of this host (the GPU to take), from 0. Local.
  [[nodiscard]] int local_rank() const;
  /// Ends all ranks now with `exit_code` after the caller has logged why. Does not return. Local.
  [[noreturn]] void abort(int exit_code = 1);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lshmoe
