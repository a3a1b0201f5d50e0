#include "lshmoe/launch/train_program.hpp"

#include <algorithm>
#include <exception>
#include <filesystem>
#include <iterator>
#include <optional>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include "lshmoe/comm/session.hpp"
#include "lshmoe/launch/device.hpp"
#include "lshmoe/launch/study.hpp"
#include "lshmoe/launch/trainer.hpp"
#include "lshmoe/runtime/error.hpp"
#include "lshmoe/runtime/files.hpp"
#include "lshmoe/runtime/log.hpp"
#include "lshmoe/runtime/memory.hpp"
#include "lshmoe/runtime/signals.hpp"
#include "lshmoe/runtime/trace.hpp"

namespace lshmoe::launch {
namespace {

/// Every rank throws it with the same text: rank 0 says it, and the job ends without an abort.
class AgreedError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Runs the local `part` on every rank. If it throws on any, all throw AgreedError with the text of
/// the lowest such rank. Collective.
template <class Part>
void together(Communicator& world, Part part) {
  std::string problem;
  try {
    part();
  } catch (const std::exception& error) {
    problem = error.what();
    if (problem.empty()) problem = "unknown error";
  }
  const auto lengths = all_gather(world, problem.size(), Purpose::control);
  for (int rank = 0; rank < world.size(); ++rank) {
    std::size_t length = lengths[static_cast<std::size_t>(rank)];
    if (length == 0) continue;
    problem.resize(length);
    world.broadcast(problem.data(), length, rank, Purpose::control);
    throw AgreedError(problem);
  }
}

/// Throws AgreedError where an option differs that is not about this rank's own files and lines.
void check_same_options(Communicator& world, const OptionParser& parser) {
  constexpr std::string_view kMayDiffer[] = {"config",   "data",  "metrics",
                                             "progress", "trace", "nvtx"};
  // Name, value, name, value; a zero ends each, which no argument and no file holds.
  std::string own;
  for (const OptionValue& option : parser.values()) {
    if (std::find(std::begin(kMayDiffer), std::end(kMayDiffer), option.name) ==
        std::end(kMayDiffer)) {
      own += option.name + '\0' + option.text + '\0';
    }
  }
  const auto all = world.gather(std::as_bytes(std::span(own)), 0, Purpose::control);
  together(world, [&] {
    for (std::size_t rank = 1; rank < all.size(); ++rank) {
      const std::string others(reinterpret_cast<const char*>(all[rank].data()), all[rank].size());
      std::istringstream mine(own), theirs(others);
      std::string name, value, other_name, other_value;
      const auto next = [](std::istream& list, std::string& text) {
        return static_cast<bool>(std::getline(list, text, '\0'));
      };
      while (next(mine, name) && next(mine, value) && next(theirs, other_name) &&
             next(theirs, other_value)) {
        if (name == other_name && value == other_value) continue;
        throw AgreedError(detail::message("rank ", rank, " has --", other_name, " '", other_value,
                                          "', rank 0 has --", name, " '", value,
                                          "': start all ranks with the same options"));
      }
    }
  });
}

void check_same_data(Communicator& world, const DataSource& data) {
  const auto all = all_gather(world, data.fingerprint(), Purpose::control);
  for (std::size_t rank = 0; rank < all.size(); ++rank) {
    if (all[rank] != all[0]) {
      throw AgreedError(detail::message("rank ", rank,
                                        " sees other data than rank 0 (the files' "
                                        "number or sizes differ): give all ranks the same files"));
    }
  }
}

void run(Session& session, TrainOptions options, const OpenData& open_data, const StopFlag& stop) {
  const auto world = session.world();
  std::unique_ptr<DataSource> data;
  std::optional<TraceSession> trace;
  std::optional<NvtxRanges> nvtx;
  together(*world, [&] {
    validate(options, world->size());
    if (options.study) validate_study(options, world->size());
    LSHMOE_VALIDATE(options.trace.empty() ||
                        !same_output(options.metrics, trace_path(options.trace, 0, world->size())),
                    "metrics and trace go to the same file, '", options.metrics,
                    "' (one would overwrite the other): name two");
    options.metrics = with_stdout_to_itself(options.metrics);
    data = open_data(options);
    if (!options.trace.empty()) {
      std::error_code none;
      LSHMOE_VALIDATE(
          world->size() == 1 || !(options.trace == "-" || options.trace.starts_with("/dev/") ||
                                  std::filesystem::is_other(options.trace, none)),
          "trace '", options.trace, "' is no file (each of the ", world->size(),
          " ranks writes one of its own, named after it): name a file");
      if (world->size() == 1) options.trace = with_stdout_to_itself(options.trace);
      trace.emplace(trace_path(options.trace, world->rank(), world->size()));
    }
    if (options.nvtx) nvtx.emplace();
  });
  check_same_data(*world, *data);
  try {
    resolve_device(session, options);
  } catch (const InvalidArgument& error) {  // of all ranks alike
    throw AgreedError(error.what());
  }
  const ExpertGroups groups = make_expert_groups(training_world(session, options),
                                                 effective_ep_size(options, world->size()));
  try {
    const auto stop_requested = [&] { return stop.requested(); };
    if (options.study) {
      study(options, groups, open_data, stop_requested);
    } else {
      train(options, groups, *data, stop_requested);
    }
  } catch (const NotFinite& error) {
    throw AgreedError(error.what());
  }
  if (trace) trace->write();
}

}  // namespace

int train_program(int argc, char** argv, const OpenData& open_data) {
  tune_allocator();
  ignore_broken_pipes();
  const StopFlag stop;  // before anything that takes time
  TrainOptions options{};
  OptionParser parser("lshmoe-train",
                      "Trains a mixture-of-experts language model, alone or under mpirun.");
  add_train_options(parser, options);
  // The session needs the time-out, and rank 0 of the session is who complains about options.
  bool help = false;
  std::exception_ptr bad_options;
  try {
    help = !parser.parse(argc, argv, /*print_help=*/false);
    if (!help && options.study) check_beside_study(parser);
  } catch (const InvalidArgument&) {
    bad_options = std::current_exception();
  }
  SessionOptions session_options;
  if (!bad_options && !help && options.timeout > 0) {
    session_options.timeout_seconds = options.timeout;
  }
  std::optional<Session> session;
  try {
    session.emplace(argc, argv, session_options);
  } catch (const std::exception& error) {
    if (help) {  // as in the shell of an allocation, where no training could start
      try {
        parser.show_help();
        return 0;
      } catch (const Error& unwritten) {
        log_error(unwritten.what());
        return 1;
      }
    }
    log_error(error.what());
    return 1;
  }
  return session->run([&] {
    const bool speaks = session->world()->rank() == 0;
    try {
      together(*session->world(), [&] {
        if (bad_options) std::rethrow_exception(bad_options);
      });
      check_same_options(*session->world(), parser);
      if (!help) {
        run(*session, options, open_data, stop);
      } else if (speaks) {
        parser.show_help();
      }
      return 0;
    } catch (const AgreedError& error) {
      if (speaks) log_error(error.what());
      return 1;
    }
  });
}

}  // namespace lshmoe::launch
