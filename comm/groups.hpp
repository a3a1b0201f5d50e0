#pragma once
// The groups of an expert-parallel job: World W = ep_size x replicas.

#include <memory>

#include "lshmoe/comm/communicator.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

/// Communicators of one rank. World rank r has expert-parallel rank r % ep_size and replica number
/// r / ep_size.
struct ExpertGroups {
  std::shared_ptr<Communicator> world;
  std::shared_ptr<Communicator> expert;   ///< ep_size ranks that hold different experts
  std::shared_ptr<Communicator> replica;  ///< ranks of equal expert-parallel rank: same experts
  std::shared_ptr<Communicator> node;     ///< ranks on one host
  std::shared_ptr<Communicator> rail;     ///< equal local rank across hosts
};

/// Splits `world`. ep_size 0 means all of the world. Collective.
/// Throws InvalidArgument when ep_size does not divide the world's size.
[[nodiscard]] ExpertGroups make_expert_groups(std::shared_ptr<Communicator> world, int ep_size = 0);

}  // namespace lshmoe
