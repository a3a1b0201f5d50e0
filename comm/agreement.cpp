#include "lshmoe/comm/agreement.hpp"

#include <cstdint>
#include <optional>
#include <string>

namespace lshmoe {
namespace {

struct Outcome {
  std::uint32_t abandoned = 0;  // 0, or 1 + reason
  std::uint32_t cause_bytes = 0;
};

/// Tells all ranks how this one fares, and throws on all where one has abandoned the step.
void throw_if_any(Communicator& comm, const std::optional<StepAbandoned>& mine) {
  Outcome outcome;
  if (mine) {
    outcome = {1 + static_cast<std::uint32_t>(mine->reason),
               static_cast<std::uint32_t>(mine->cause.size())};
  }
  const auto all = all_gather(comm, outcome, Purpose::control);
  for (std::size_t rank = 0; rank < all.size(); ++rank) {
    if (all[rank].abandoned == 0) continue;
    std::string cause = mine ? mine->cause : std::string();
    cause.resize(all[rank].cause_bytes);
    comm.broadcast(cause.data(), cause.size(), static_cast<int>(rank), Purpose::control);
    StepAbandoned error(static_cast<StepAbandoned::Reason>(all[rank].abandoned - 1), cause);
    error.agreed = true;
    throw error;
  }
}

}  // namespace

void run_together(Communicator& comm, const std::function<void()>& part) {
  std::optional<StepAbandoned> mine;
  try {
    part();
  } catch (const StepAbandoned& error) {
    if (error.agreed) throw;
    mine.emplace(error);
  }
  throw_if_any(comm, mine);
}

void go_on_together(Communicator& comm) { throw_if_any(comm, std::nullopt); }

}  // namespace lshmoe
