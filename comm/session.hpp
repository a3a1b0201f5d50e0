#pragma once
// Session: what one process of a job needs before anything else: MPI, its rank, its device.

#include <functional>
#include <memory>
#include <string>

#include "lshmoe/comm/communicator.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

struct SessionOptions {
  double timeout_seconds = 300.0;  ///< see Communicator::timeout_seconds
};

/// The GPU of a rank, or why it has none.
struct DeviceChoice {
  int index = -1;       ///< among the GPUs that this process sees; -1: none
  std::string problem;  ///< why none, and what to do: the same text on all ranks; else empty
};

/// Owns the process's part in the job. Make one, first thing in main, and let it live until the
/// end:
///
///     int main(int argc, char** argv) {
///       lshmoe::Session session(argc, argv);
///       return session.run([&] { return train(session); });
///     }
///
/// Under mpirun or Slurm (OMPI_COMM_WORLD_SIZE, PMIX_RANK, PMI_RANK or PMI_SIZE in the environment)
/// it initializes MPI at THREAD_SERIALIZED and finalizes it; without them the world is this process
/// alone ("self") and MPI is not touched. MPI that the program initialized itself is used, and left
/// to the program to finalize. A world of one that no mpirun asked for, where a variable says that
/// a launcher started several processes (of Slurm, Flux, PALS, jsrun, torchrun, MVAPICH, Hydra,
/// another Open MPI), throws CommError with its name: it would be that many separate trainings.
/// Sets the process rank of error and log texts when the world has more than one rank.
class Session {
 public:
  /// Collective over the job. argc and argv may be null/0; they are not changed.
  explicit Session(int argc = 0, char** argv = nullptr, SessionOptions options = {});
  /// Waits, with the deadline, for the other ranks to end too, then finalizes MPI. Aborts the job
  /// (MPI_Abort) instead when an exception is unwinding through here, or a rank does not come: an
  /// MPI_Finalize would hang then. The text of that exception is lost: catch it inside, as run
  /// does.
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  /// All ranks of the job. Local. Stays usable as long as this Session lives.
  [[nodiscard]] std::shared_ptr<Communicator> world() const;
  /// Rank among the ranks of this host (the GPU to take), from 0. Local.
  [[nodiscard]] int local_rank() const;

  /// The GPU for this rank, made the current device of the calling thread: number local_rank() of
  /// those that the process sees, or the one that it sees (a launcher may show each rank its own).
  /// Ranks of a host take different GPUs; with `share_gpu` several may take the same. Where one
  /// rank finds none, no rank gets one, and all are told the same problem. Collective over the
  /// world.
  [[nodiscard]] DeviceChoice choose_device(bool share_gpu = false) const;
  /// The same; throws the problem, as NotConfigured in a build without CUDA, else InvalidArgument.
  [[nodiscard]] int select_device(bool share_gpu = false) const;

  /// The one catch a program's main needs: returns body(); if it throws, logs the error in one line
  /// and ends all ranks with exit code 1. Alone (world of 1) it returns 1 instead. Local.
  [[nodiscard]] int run(const std::function<int()>& body);
  /// Ends all ranks now with `exit_code` after the caller has logged why. Does not return. Local.
  [[noreturn]] void abort(int exit_code = 1);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lshmoe
