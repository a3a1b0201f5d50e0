// The codecs of GPU rows with their kernels on the CPU: the CPU codec's bytes and rows, to the bit.

#include <numeric>

#include "tests/compress/cuda_batch_checks.hpp"
// clang-format off: renames what follows.
#include "tests/support/cuda_on_host.hpp"

#include "kernels/cuda/basis.cu"
#include "kernels/cuda/combine.cu"
#include "kernels/cuda/formats.cu"
#include "kernels/cuda/lsh.cu"
#include "kernels/cuda/parcel.cu"
#include "kernels/cuda/plan.cu"
#include "kernels/cuda/row_coder.cu"
#include "kernels/cuda/rows.cu"

#include "compress/cuda/batch.cpp"
#include "compress/cuda/codec.cpp"
#include "compress/cuda/fixed.cpp"
#include "compress/cuda/lsh.cpp"
#include "compress/cuda/lsh_decoder.cpp"
#include "compress/cuda/lsh_state.cpp"
#include "compress/cuda/projection.cpp"
#include "compress/cuda/stream_phases.cpp"
#include "compress/cuda/support.cpp"
// clang-format on

// In place of cuBLAS and CUB: the CPU's own product, and a stable sort.
namespace lshmoe::kernels::cuda {
std::size_t sort_scratch(std::int64_t) { return 1; }
void sort_by_key(std::int64_t* order, std::uint64_t* sorted, const std::uint64_t* keys,
                 std::int64_t rows, int bits, void*, std::size_t, Stream) {
  std::iota(order, order + rows, std::int64_t{0});
  std::stable_sort(order, order + rows,
                   [keys](std::int64_t a, std::int64_t b) { return keys[a] < keys[b]; });
  for (std::int64_t i = 0; i < rows; ++i) {
    sorted[i] = keys[order[i]];
    if (bits < 64) {
      EXPECT_LT(keys[i], std::uint64_t{1} << bits);
    }
  }
}
Product::Product() = default;
Product::~Product() = default;
void Product::operator()(float* out, const float* x, const float* matrix, std::int64_t rows,
                         std::int64_t inner, std::int64_t columns, Stream) const {
  multiply(out, x, matrix, rows, inner, columns);
}
}  // namespace lshmoe::kernels::cuda
namespace lshmoe::cuda {
launchers::Stream current_stream(at::Device) { return nullptr; }
}  // namespace lshmoe::cuda

namespace lshmoe {
namespace {

class CudaOnHost : public ::testing::Test {
 protected:
  CudaOnHost() { kernels::cuda::set_grid_limit(3); }
  testing::CudaBatchChecks checks_{{[](const CodecOptions& options, const CodecContext& context) {
    return cuda::make_codec(options, context);
  }}};
};

TEST_F(CudaOnHost, FixedKinds) { checks_.fixed_kinds(); }
TEST_F(CudaOnHost, RowsWithinABound) { checks_.rows_within_a_bound(); }
TEST_F(CudaOnHost, AllKindsOfRows) { checks_.all_kinds_of_rows(); }
TEST_F(CudaOnHost, Refusals) { checks_.refusals(); }
TEST_F(CudaOnHost, DamagedParcels) { checks_.damaged_parcels(); }
TEST_F(CudaOnHost, BatchParcels) { checks_.batch_parcels(); }
TEST_F(CudaOnHost, BatchOptions) { checks_.batch_options(); }
TEST_F(CudaOnHost, BatchSizes) { checks_.batch_sizes(4097); }
TEST_F(CudaOnHost, BatchKinds) { checks_.batch_kinds(); }
TEST_F(CudaOnHost, Basis) { checks_.basis(); }
TEST_F(CudaOnHost, PhasesAddUp) {
  const CodecContext context{64, 0, Direction::dispatch, at::kFloat};
  const auto codec = cuda::make_codec(resolved(CodecOptions(), context.direction), context);
  const at::Tensor x = testing::clustered(200, 64, 4, 0.1, 1);
  const auto names = [](cuda::StreamPhases& phases, double most) {
    std::vector<std::string> names;
    double sum = 0;
    for (const auto& [name, seconds] : phases.seconds()) {
      names.push_back(name);
      EXPECT_GE(seconds, 0) << name;
      sum += seconds;
    }
    EXPECT_GT(sum, 0);
    EXPECT_LE(sum, most);
    return names;
  };
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  Encoded encoded;
  {
    const auto start = Clock::now();
    cuda::StreamPhases phases{at::kCPU};
    encoded = codec->encode(x, {200});
    const auto found = names(phases, since(start) + 1);
    const std::vector<std::string> want{
        "norms",    "means",     "channel order", "estimate", "project",  "sort",     "nearest",
        "clusters", "centroids", "code",          "sizes",    "assemble", "checksum", "rest"};
    EXPECT_EQ(found, want);
  }
  {
    cuda::StreamPhases phases{at::kCPU};
    static_cast<void>(codec->decode(encoded.bytes, encoded.bytes_per_group));
    std::vector<std::string> found;
    for (const auto& one : phases.seconds()) found.push_back(one.first);
    const std::vector<std::string> want{"headers", "checksum",           "shared part",
                                        "sizes",   "unpack and restore", "checks"};
    EXPECT_EQ(found, want);
  }
  // Nothing is recorded without one.
  static_cast<void>(codec->encode(x, {200}));
  EXPECT_TRUE(cuda::StreamPhases{at::kCPU}.seconds().empty());
}
TEST_F(CudaOnHost, Staged) { checks_.staged(); }

}  // namespace
}  // namespace lshmoe
