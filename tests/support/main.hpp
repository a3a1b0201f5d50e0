#pragma once
// The Session of the test program; see main.cpp.

#include <memory>

#include "lshmoe/comm/session.hpp"

namespace lshmoe::testing {

[[nodiscard]] Session& session();
/// The world of the test program: 1 rank alone, n under mpirun -n n.
[[nodiscard]] std::shared_ptr<Communicator> world();

}  // namespace lshmoe::testing
