#include "lshmoe/comm/groups.hpp"

#include <gtest/gtest.h>

#include <algorithm>

#include "tests/support/errors.hpp"
#include "tests/support/main.hpp"

namespace lshmoe {
namespace {

using testing::expect_error;
using testing::world;

std::vector<int> members(const Communicator& comm) {
  std::vector<int> ranks;
  for (int r = 0; r < comm.size(); ++r) ranks.push_back(comm.world_rank(r));
  return ranks;
}

TEST(Split, OrdersByKeyAndKnowsItsWorldRanks) {
  const int rank = world()->rank();
  const auto half = world()->split(rank % 2, -rank, "half");
  EXPECT_EQ(half->name(), "world/half");
  std::vector<int> expected;
  for (int r = world()->size() - 1; r >= 0; --r) {
    if (r % 2 == rank % 2) expected.push_back(r);
  }
  EXPECT_EQ(members(*half), expected);
  EXPECT_EQ(half->world_rank(half->rank()), rank);
  EXPECT_EQ(half->host(half->rank()), world()->host(rank));
  EXPECT_EQ(half->timeout_seconds(), world()->timeout_seconds());

  // Both halves at once, and the world between: messages of one never meet another's.
  for (int round = 0; round < 20; ++round) {
    std::int64_t sum = rank, all = rank;
    half->all_reduce(std::span(&sum, 1), ReduceOp::sum, Purpose::control);
    world()->all_reduce(std::span(&all, 1), ReduceOp::sum, Purpose::control);
    std::int64_t expected_sum = 0;
    for (const int r : expected) expected_sum += r;
    EXPECT_EQ(sum, expected_sum);
    EXPECT_EQ(all, world()->size() * (world()->size() - 1) / 2);
  }
}

TEST(Split, OutlivesItsParentHandle) {
  std::shared_ptr<Communicator> inner;
  {
    const auto outer = world()->split(0, world()->rank(), "outer");
    inner = outer->split(0, outer->rank(), "inner");
  }
  EXPECT_EQ(inner->name(), "world/outer/inner");
  inner->barrier();
}

TEST(ExpertGroups, EveryEpSizeThatDivides) {
  const int size = world()->size();
  const int rank = world()->rank();
  for (int ep = 1; ep <= size; ++ep) {
    if (size % ep != 0) {
      EXPECT_THROW((void)make_expert_groups(world(), ep), InvalidArgument);
      continue;
    }
    const ExpertGroups groups = make_expert_groups(world(), ep);
    std::vector<int> expert, replica;
    for (int r = 0; r < size; ++r) {
      if (r / ep == rank / ep) expert.push_back(r);
      if (r % ep == rank % ep) replica.push_back(r);
    }
    EXPECT_EQ(members(*groups.expert), expert);
    EXPECT_EQ(members(*groups.replica), replica);
    EXPECT_EQ(groups.expert->rank(), rank % ep);
    EXPECT_EQ(groups.replica->rank(), rank / ep);
    EXPECT_EQ(groups.world, world());
    // Node and rail: this test runs on one host.
    EXPECT_EQ(groups.node->size(), size);
    EXPECT_EQ(groups.rail->size(), 1);
    EXPECT_EQ(groups.node->rank(), testing::session().local_rank());
    groups.expert->barrier();
    groups.replica->barrier();
  }
}

TEST(ExpertGroups, DefaultIsTheWholeWorld) {
  EXPECT_EQ(make_expert_groups(world()).expert->size(), world()->size());
}

TEST(ExpertGroups, RefusesWhatDoesNotDivide) {
  for (const int ep : {-1, world()->size() + 1}) {
    expect_error(
        "ep_size " + std::to_string(ep) + " does not divide the " +
            (world()->size() == 1 ? "1 rank" : std::to_string(world()->size()) + " ranks") +
            " of the job",
        [&] { (void)make_expert_groups(world(), ep); });
  }
}

}  // namespace
}  // namespace lshmoe
