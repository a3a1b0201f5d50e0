#pragma once
// The backend of a process alone: one rank, every exchange is a copy.

#include <memory>
#include <string>

#include "lshmoe/comm/communicator.hpp"

namespace lshmoe {

/// A communicator of this process alone. Local.
[[nodiscard]] std::shared_ptr<Communicator> make_self_communicator(
    const std::string& name = "world", double timeout_seconds = 300.0);

}  // namespace lshmoe
