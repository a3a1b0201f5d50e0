// Main of every test program: one Session for the process, so that the same test runs alone and
// under mpirun; each rank's failures are printed with its rank.

#include "tests/support/main.hpp"

#include <gtest/gtest.h>

#include <cstdio>
#include <memory>

#include "lshmoe/comm/session.hpp"

namespace lshmoe::testing {
namespace {
Session* g_session = nullptr;

class RankPrinter : public ::testing::EmptyTestEventListener {
  void OnTestPartResult(const ::testing::TestPartResult& result) override {
    if (!result.failed() || session().world()->size() == 1) return;
    std::fprintf(stderr, "[rank %d] %s:%d: %s\n", session().world()->rank(),
                 result.file_name() ? result.file_name() : "?", result.line_number(),
                 result.message());
  }
};
}  // namespace

Session& session() { return *g_session; }
std::shared_ptr<Communicator> world() { return session().world(); }

}  // namespace lshmoe::testing

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  lshmoe::Session session(argc, argv, {.timeout_seconds = 60});
  lshmoe::testing::g_session = &session;
  auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
  if (session.world()->rank() != 0) delete listeners.Release(listeners.default_result_printer());
  listeners.Append(new lshmoe::testing::RankPrinter);
  std::int64_t failed_passed_skipped[3] = {RUN_ALL_TESTS()};
  const auto& all = *::testing::UnitTest::GetInstance();
  failed_passed_skipped[1] = all.successful_test_count();
  failed_passed_skipped[2] = all.skipped_test_count();
  session.world()->all_reduce(std::span(failed_passed_skipped), lshmoe::ReduceOp::max,
                              lshmoe::Purpose::control);
  const auto [failed, passed, skipped] = failed_passed_skipped;
  constexpr int kSkipped = 77;  // ctest's SKIP_RETURN_CODE: else it would call that passed
  return failed == 0 && passed == 0 && skipped > 0 ? kSkipped : static_cast<int>(failed);
}
