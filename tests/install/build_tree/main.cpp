// Uses the package from the build tree; without torch's headers, so that it compiles in a second.

#include <cstdint>
#include <span>

#include "lshmoe/comm/session.hpp"

int main(int argc, char** argv) {
  lshmoe::Session session(argc, argv);
  std::int64_t ranks = 1;
  session.world()->all_reduce(std::span(&ranks, 1), lshmoe::ReduceOp::sum,
                              lshmoe::Purpose::control);
  return ranks == session.world()->size() ? 0 : 1;
}
