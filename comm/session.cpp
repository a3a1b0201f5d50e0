#include "lshmoe/comm/session.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <string_view>
#include <vector>

#include "lshmoe/comm/cuda/device.hpp"
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

int number(const char* variable) {
  const char* text = std::getenv(variable);
  return text == nullptr ? 0 : std::atoi(text);
}

// A variable that says there are more processes than this one: a number of them, or of this one.
struct Sign {
  const char* variable;
  int least;             // with this value or a greater one
  const char* together;  // and this variable; null: by itself
  const char* why;
  const char* instead;
};
constexpr const char* kMpirun = "start with the mpirun of the MPI that lshmoe was built with";
constexpr Sign kSigns[] = {
    {"SLURM_NTASKS", 2, nullptr, "srun gave it no MPI", "start with mpirun or srun --mpi=pmix"},
    {"MV2_COMM_WORLD_SIZE", 2, nullptr, "MVAPICH's launcher serves MVAPICH alone", kMpirun},
    {"FLUX_JOB_SIZE", 2, "FLUX_TASK_RANK", "flux run gave it no PMI that this MPI knows",
     "start with mpirun, or use an MPI with Flux support"},
    {"PALS_LOCAL_SIZE", 2, "PALS_RANKID", "PALS' mpiexec serves other MPIs", kMpirun},
    {"PALS_RANKID", 1, nullptr, "PALS' mpiexec serves other MPIs", kMpirun},
    {"JSM_NAMESPACE_SIZE", 2, nullptr, "jsrun serves Spectrum MPI", kMpirun},
    {"OMPI_COMM_WORLD_SIZE", 2, nullptr, "the mpirun of another Open MPI started it", kMpirun},
    {"PMI_SIZE", 2, nullptr,
     "a launcher of other MPIs, as Hydra of MPICH and Intel MPI, started it", kMpirun},
    {"PMI_RANK", 1, nullptr, "its launcher's PMI is not one that this MPI knows", kMpirun},
    {"PMIX_RANK", 1, nullptr, "its launcher's PMIx is not one that this MPI knows", kMpirun},
    {"WORLD_SIZE", 2, "RANK", "torchrun and its like start no MPI",
     "start with mpirun in place of torchrun"},
};

// Why a process whose world is itself alone is one of several all the same; empty: it is not. Asked
// before MPI starts, which sets some of these variables. A job of one that mpirun started inside a
// larger allocation is meant so.
std::string one_of_several() {
  if (number("OMPI_COMM_WORLD_SIZE") == 1) return {};
  for (const Sign& sign : kSigns) {
    if (number(sign.variable) < sign.least) continue;
    if (sign.together != nullptr && !is_set(sign.together)) continue;
    return detail::message(sign.variable, " is ", std::getenv(sign.variable),
                           " but this process is alone (", sign.why,
                           ", so each would train by itself): ", sign.instead, ", or unset ",
                           sign.variable, " for a run of one process");
  }
  return {};
}

// What a rank says of its GPUs.
struct Seen {
  std::int32_t count = 0;
  std::int32_t index = -1;  // the one it would take
  std::array<std::uint8_t, 16> uuid{};
  std::array<char, 128> why_none{};
};

Seen look_for_gpu(int local_rank, bool share_gpu) {
  Seen seen;
  const cuda::VisibleDevices devices = cuda::visible_devices();
  seen.count = devices.count;
  if (seen.count > local_rank || (seen.count > 1 && share_gpu)) {
    seen.index = local_rank % seen.count;
  } else if (seen.count == 1) {
    seen.index = 0;  // perhaps another GPU than its neighbors see
  }
  std::string why = devices.why_none;
  try {
    if (seen.index >= 0) seen.uuid = cuda::device_uuid(seen.index);
  } catch (const Error& error) {
    why = error.what();
    seen.count = 0;
  }
  std::strncpy(seen.why_none.data(), why.c_str(), seen.why_none.size() - 1);
  return seen;
}

// What is wrong with the ranks' choices; the same on every rank. Empty: nothing.
std::string problem_of(const Communicator& world, const std::vector<Seen>& all, bool share_gpu) {
  for (int rank = 0; rank < world.size(); ++rank) {
    const Seen& seen = all[static_cast<std::size_t>(rank)];
    if (seen.count == 0) {
      return detail::message("no GPU for rank ", rank, " on ", world.host(rank), " (",
                             seen.why_none.data(), "): use --device cpu, or a machine with GPUs");
    }
    int ranks = 0;
    std::vector<std::array<std::uint8_t, 16>> gpus;
    for (int other = 0; other < world.size(); ++other) {
      if (world.host(other) != world.host(rank)) continue;
      ++ranks;
      const Seen& theirs = all[static_cast<std::size_t>(other)];
      if (theirs.index >= 0 && std::find(gpus.begin(), gpus.end(), theirs.uuid) == gpus.end()) {
        gpus.push_back(theirs.uuid);
      }
    }
    const auto taken = static_cast<int>(gpus.size());
    if (!share_gpu && taken < ranks) {
      return detail::message(world.host(rank), " has ", detail::counted(taken, "GPU"), " for its ",
                             detail::counted(ranks, "rank"),
                             " (each rank takes one of its own): start ",
                             detail::counted(taken, "rank"),
                             " a host, or let them share one (--share-gpu, with the mpi "
                             "backend)");
    }
  }
  return {};
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
  const std::string problem = one_of_several();
  if (!started_by_launcher()) {
    if (!problem.empty()) throw CommError(problem);
    impl_->world = make_self_communicator("world", options.timeout_seconds);
    return;
  }
  impl_->finalize = mpi::start();
  impl_->world = mpi::make_world(options.timeout_seconds);
  const Communicator& world = *impl_->world;
  if (world.size() == 1) {
    if (!problem.empty()) throw CommError(problem);
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

DeviceChoice Session::choose_device(bool share_gpu) const {
  Communicator& world = *impl_->world;
  const Seen mine = look_for_gpu(impl_->local_rank, share_gpu);
  const std::vector<Seen> all = all_gather(world, mine, Purpose::control);
  DeviceChoice choice;
  choice.problem = problem_of(world, all, share_gpu);
  if (!choice.problem.empty()) return choice;
  choice.index = mine.index;
  cuda::use_device(choice.index);
  return choice;
}

int Session::select_device(bool share_gpu) const {
  DeviceChoice choice = choose_device(share_gpu);
  if (choice.problem.empty()) return choice.index;
  if (!cuda::configured()) throw NotConfigured(choice.problem);
  throw InvalidArgument(choice.problem);
}

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
