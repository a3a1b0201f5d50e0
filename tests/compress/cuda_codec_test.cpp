// The codecs of GPU rows on a GPU against the CPU's. Skipped without one.

#include <gtest/gtest.h>

#include <numeric>

#include "tests/compress/cuda_batch_checks.hpp"

namespace lshmoe {
namespace {

class CudaCodec : public ::testing::Test {
 protected:
  void SetUp() override {
    if (at::getNumGPUs() == 0) GTEST_SKIP() << "no CUDA device";
    checks_.make = [](const CodecOptions& options, const CodecContext& context) {
      return make_codec(options, context);
    };
    checks_.device = at::Device(at::kCUDA, 0);
    // cuBLAS sums in another order: rows between two centroids may take the other one.
    checks_.same_bytes = false;
    checks_.hidden = {16, 100, 384, 4096};
  }
  testing::CudaBatchChecks checks_;
};

TEST_F(CudaCodec, FixedKinds) {
  checks_.same_bytes = true;
  checks_.fixed_kinds();
}
TEST_F(CudaCodec, RowsWithinABound) { checks_.rows_within_a_bound(); }
TEST_F(CudaCodec, AllKindsOfRows) { checks_.all_kinds_of_rows(); }
TEST_F(CudaCodec, Refusals) { checks_.refusals(); }
TEST_F(CudaCodec, DamagedParcels) { checks_.damaged_parcels(); }
TEST_F(CudaCodec, BatchParcels) { checks_.batch_parcels(); }
TEST_F(CudaCodec, BatchOptions) { checks_.batch_options(); }
TEST_F(CudaCodec, BatchSizes) { checks_.batch_sizes(4097); }
TEST_F(CudaCodec, BatchKinds) { checks_.batch_kinds(); }
TEST_F(CudaCodec, Basis) { checks_.basis(); }
TEST_F(CudaCodec, Staged) { checks_.staged(); }

// A build without CUDA says so.
TEST(CudaCodecDisabled, NamesTheOption) {
#if !defined(LSHMOE_TEST_WITH_CUDA)
  testing::expect_error<NotConfigured>("-DLSHMOE_CUDA=ON", [] {
    (void)make_codec(CodecOptions(), {8, 0, Direction::dispatch, at::kFloat, at::kCUDA});
  });
#else
  GTEST_SKIP() << "this build has CUDA";
#endif
}

}  // namespace
}  // namespace lshmoe
