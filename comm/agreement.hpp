#pragma once
// What one rank found out becomes known to all: ranks that disagree would wait for each other.

#include <functional>

#include "lshmoe/comm/communicator.hpp"
#include "lshmoe/runtime/abandon.hpp"

namespace lshmoe {

/// Runs `part`, local or collective over groups inside `comm`, on every rank. When it throws
/// StepAbandoned on some rank, all ranks throw StepAbandoned with the reason and cause of the
/// lowest such rank, once their own part has ended. Other exceptions pass at once.
///
/// With several expert groups the forward and backward of a step go through it:
///
///     run_together(*groups.world, [&] { (loss_of(batch)).backward(); });
///
/// Collective over `comm`, 8 bytes to each rank. `part` may use `comm` only behind
/// go_on_together().
void run_together(Communicator& comm, const std::function<void()>& part);

/// Before a collective over `comm` inside a run_together() of it: throws StepAbandoned on all ranks
/// that are still in their parts where one of them has left its own. Collective over `comm`, 8
/// bytes to each rank.
void go_on_together(Communicator& comm);

}  // namespace lshmoe
