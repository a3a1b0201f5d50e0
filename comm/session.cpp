#include "lshmoe/comm/session.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <string_view>

#include "lshmoe/comm/mpi/job.hpp"
#include "lshmoe/comm/self/self.hpp"
#include "lshmoe/runtime/error.hpp"
#include "lshmoe/runtime/log.hpp"

namespace lshmoe {
namespace {

bool is_set(const char* variable) { return std::getenv(variable) != nullptr; }

// Exactly the variables a launcher sets for each process. OMPI_ alone would not do: OMPI_MCA_* and
// OMPI_ALLOW_RUN_AS_ROOT are settings that users export for good.
bool started_by_launcher() {
  return is_set("OMPI_COMM_WORLD_SIZE") || is_set("PMIX_RANK") || is_set("PMI_RANK") ||
         is_set("PMI_SIZE");
}

void refuse_many_worlds_of_one(bool started_by_mpirun) {
  const char* tasks = std::getenv("SLURM_NTASKS");
  if (tasks == nullptr || std::atoi(tasks) <= 1 || started_by_mpirun) return;
  throw CommError(detail::message(
      "SLURM_NTASKS is ", tasks,
      " but this process is alone (srun gave it no MPI, so each task would train by itself): start "
      "with mpirun or srun --mpi=pmix, or unset SLURM_NTASKS for a run of one process"));
}

std::string_view first_line(std::string_view text) { return text.substr(0, text.find('\n')); }

}  // namespace

struct Session::Impl {
  bool finalize = false;  // this Session started MPI
  int exceptions = std::uncaught_exceptions();
  int local_rank = 0;
  std::shared_ptr<Communicator> world;

  bool uses_mpi() const { return world->backend() != "self"; }
};

Session::Session(int, char**, SessionOptions options) : impl_(std::make_unique<Impl>()) {
  LSHMOE_VALIDATE(options.timeout_seconds > 0, "timeout of ", options.timeout_seconds,
                  " s (no call could ever finish): pass seconds > 0");
  if (!started_by_launcher()) {
    refuse_many_worlds_of_one(false);
    impl_->world = make_self_communicator("world", options.timeout_seconds);
    return;
  }
  // MPI_Init sets OMPI_COMM_WORLD_SIZE itself, so look before it.
  const bool started_by_mpirun = is_set("OMPI_COMM_WORLD_SIZE");
  impl_->finalize = mpi::start();
  impl_->world = mpi::make_world(options.timeout_seconds);
  const Communicator& world = *impl_->world;
  if (world.size() == 1) {
    refuse_many_worlds_of_one(started_by_mpirun);
    return;
  }
  set_process_rank(world.rank());
  for (int other = 0; other < world.rank(); ++other) {
    if (world.host(other) == world.host(world.rank())) ++impl_->local_rank;
  }
}

Session::~Session() {
  if (!impl_->uses_mpi()) return;
  if (std::uncaught_exceptions() > impl_->exceptions) {
    log_error("an exception ends this rank: ending the whole job");
    abort();
  }
  if (!impl_->finalize) return;
  try {
    impl_->world->barrier();
  } catch (const std::exception& error) {
    log_error(error.what() + std::string(", at the end of the job"));
    abort();
  }
  impl_->world.reset();
  mpi::finalize();
  set_process_rank(-1);
}

std::shared_ptr<Communicator> Session::world() const { return impl_->world; }
int Session::local_rank() const { return impl_->local_rank; }

int Session::run(const std::function<int()>& body) {
  try {
    return body();
  } catch (const std::exception& error) {
    log_error(std::string(first_line(error.what())));
  } catch (...) {
    log_error("an exception that is no std::exception");
  }
  if (impl_->world->size() > 1) abort();
  return 1;
}

void Session::abort(int exit_code) {
  std::fflush(nullptr);
  if (impl_->uses_mpi()) mpi::abort(exit_code);
  std::_Exit(exit_code);
}

}  // namespace lshmoe
