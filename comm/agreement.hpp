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
/// Collective over `comm`, which `part` must not use otherwise: 8 bytes to each rank.
void run_together(Communicator& comm, const std::function<void()>& part);

}  // namespace lshmoe
