// The codecs of GPU rows with their kernels on the CPU: the CPU codec's bytes and rows, to the bit.

#include <numeric>

#include "tests/compress/cuda_codec_checks.hpp"
// clang-format off: renames what follows.
#include "tests/support/cuda_on_host.hpp"

#include "kernels/cuda/combine.cu"
#include "kernels/cuda/formats.cu"
#include "kernels/cuda/lsh.cu"
#include "kernels/cuda/parcel.cu"
#include "kernels/cuda/row_coder.cu"
#include "kernels/cuda/rows.cu"

#include "compress/cuda/codec.cpp"
#include "compress/cuda/fixed.cpp"
#include "compress/cuda/lsh.cpp"
#include "compress/cuda/support.cpp"
// clang-format on

// In place of cuBLAS: the CPU's own product.
namespace lshmoe::kernels::cuda {
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
  testing::CudaChecks checks_{[](const CodecOptions& options, const CodecContext& context) {
    return cuda::make_codec(options, context);
  }};
};

TEST_F(CudaOnHost, FixedKinds) { checks_.fixed_kinds(); }
TEST_F(CudaOnHost, RowsWithinABound) { checks_.rows_within_a_bound(); }
TEST_F(CudaOnHost, AllKindsOfRows) { checks_.all_kinds_of_rows(); }
TEST_F(CudaOnHost, Refusals) { checks_.refusals(); }
TEST_F(CudaOnHost, DamagedParcels) { checks_.damaged_parcels(); }
TEST_F(CudaOnHost, BatchParcels) { checks_.batch_parcels(); }
TEST_F(CudaOnHost, Staged) { checks_.staged(); }

}  // namespace
}  // namespace lshmoe
