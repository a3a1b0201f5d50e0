#include "lshmoe/runtime/deadline.hpp"

#include <gtest/gtest.h>

#include <limits>
#include <thread>

namespace lshmoe {
namespace {

TEST(Deadline, ExpiresAfterItsSecondsAndNotBefore) {
  const Deadline deadline(0.05);
  EXPECT_FALSE(deadline.expired());
  EXPECT_GT(deadline.remaining(), 0.0);
  EXPECT_LE(deadline.remaining(), 0.05);
  std::this_thread::sleep_for(std::chrono::milliseconds(60));
  EXPECT_TRUE(deadline.expired());
  EXPECT_EQ(deadline.remaining(), 0.0);
}

TEST(Deadline, NothingToWaitForHasExpired) {
  EXPECT_TRUE(Deadline(0).expired());
  EXPECT_TRUE(Deadline(-1).expired());
}

TEST(Deadline, EndlessDoesNotOverflow) {
  const Deadline deadline(std::numeric_limits<double>::infinity());
  EXPECT_FALSE(deadline.expired());
  EXPECT_GT(deadline.remaining(), 1e9);
}

}  // namespace
}  // namespace lshmoe
