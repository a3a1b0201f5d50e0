// Main of every test program: one Session for the process, so that the same test runs alone and
// under mpirun; each rank's failures are printed with its rank. torch's default generator, which
// each process would seed at random, starts from the same seed in every test: 1, or the
// environment's LSHMOE_TEST_SEED.

#include "tests/support/main.hpp"

#include <ATen/Context.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "lshmoe/comm/session.hpp"

namespace lshmoe::testing {
namespace {
Session* g_session = nullptr;
std::uint64_t g_seed = 1;

class Seeder : public ::testing::EmptyTestEventListener {
  void OnTestStart(const ::testing::TestInfo&) override { at::manual_seed(g_seed); }
};

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
  if (const char* seed = std::getenv("LSHMOE_TEST_SEED")) {
    lshmoe::testing::g_seed = std::stoull(seed);
  }
  if (session.world()->rank() == 0) {
    std::printf("torch's default generator: seed %llu (LSHMOE_TEST_SEED)\n",
                static_cast<unsigned long long>(lshmoe::testing::g_seed));
  }
  listeners.Append(new lshmoe::testing::Seeder);
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
