// What one rank abandons, all abandon; nothing else is hurt.

#include "lshmoe/comm/agreement.hpp"

#include <gtest/gtest.h>

#include <span>
#include <string>

#include "lshmoe/runtime/error.hpp"
#include "tests/support/main.hpp"

namespace lshmoe {
namespace {

using testing::world;
using Reason = StepAbandoned::Reason;

TEST(Agreement, NothingHappensWhereNobodyAbandons) {
  for (int i = 0; i < 3; ++i) {
    int runs = 0;
    run_together(*world(), [&] { ++runs; });
    EXPECT_EQ(runs, 1);
  }
}

TEST(Agreement, AllThrowWhatTheLowestRankThrew) {
  const int rank = world()->rank(), last = world()->size() - 1;
  for (const Reason reason : {Reason::stop, Reason::not_finite}) {
    for (const int first : {0, last}) {
      std::string cause;
      try {
        run_together(*world(), [&] {
          if (rank >= first) throw StepAbandoned(reason, "rank " + std::to_string(rank) + "'s");
        });
        ADD_FAILURE() << "rank " << rank << " goes on";
      } catch (const StepAbandoned& error) {
        EXPECT_EQ(error.reason, reason);
        cause = error.cause;
        EXPECT_NE(std::string(error.what())
                      .find(reason == Reason::stop ? "end the job"
                                                   : "lower the learning rate or clip gradients"),
                  std::string::npos)
            << error.what();
      }
      EXPECT_EQ(cause, "rank " + std::to_string(first) + "'s");
    }
  }
  world()->barrier();  // the communicator still works
}

TEST(Agreement, WhoIsStillInItsPartThrowsBeforeItsNextCollective) {
  const int rank = world()->rank(), last = world()->size() - 1;
  double rounds = 0;
  try {
    run_together(*world(), [&] {
      for (; rounds < 5; ++rounds) {
        if (rank == last && rounds == 3) throw StepAbandoned(Reason::not_finite, "round 3");
        go_on_together(*world());
        double sum = 1;
        world()->all_reduce(std::span(&sum, 1), ReduceOp::sum, Purpose::control);
        EXPECT_EQ(sum, last + 1);
      }
    });
    ADD_FAILURE() << "rank " << rank << " goes on";
  } catch (const StepAbandoned& error) {
    EXPECT_TRUE(error.agreed);
    EXPECT_EQ(error.cause, "round 3");
  }
  EXPECT_EQ(rounds, 3);
  world()->barrier();
}

TEST(Agreement, OtherErrorsPass) {
  // On all ranks: alone, it would leave the others waiting.
  EXPECT_THROW(run_together(*world(), [] { throw InvalidArgument("a bad argument"); }),
               InvalidArgument);
}

TEST(Agreement, TheWishStaysUntilItIsWithdrawn) {
  EXPECT_FALSE(abandon_requested());
  request_abandon();
  EXPECT_TRUE(abandon_requested());
  EXPECT_TRUE(abandon_requested());
  withdraw_abandon();
  EXPECT_FALSE(abandon_requested());
}

}  // namespace
}  // namespace lshmoe
