// The launchers in a build without CUDA.

#include "lshmoe/kernels/cuda/combine.hpp"
#include "lshmoe/kernels/cuda/grid.hpp"
#include "lshmoe/kernels/cuda/rows.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::kernels::cuda {
namespace {
[[noreturn]] void refuse() {
  throw NotConfigured(
      "tensors on a GPU (this lshmoe was built without CUDA): rebuild with -DLSHMOE_CUDA=ON, or "
      "keep them on the CPU");
}
}  // namespace

void set_grid_limit(int /*blocks*/) { refuse(); }
void gather_rows(void* /*out*/, const void* /*in*/, const std::int64_t* /*index*/,
                 std::int64_t /*rows*/, std::size_t /*row_bytes*/, Stream /*stream*/) {
  refuse();
}
void scatter_rows(void* /*out*/, const std::int64_t* /*index*/, const void* /*in*/,
                  std::int64_t /*rows*/, std::size_t /*row_bytes*/, Stream /*stream*/) {
  refuse();
}
void convert(float* /*out*/, const Bfloat16* /*in*/, std::int64_t /*count*/, Stream /*stream*/) {
  refuse();
}
void convert(Bfloat16* /*out*/, const float* /*in*/, std::int64_t /*count*/, Stream /*stream*/) {
  refuse();
}
void segment_sum(RowType /*type*/, void* /*out*/, const void* /*in*/, std::int64_t /*hidden*/,
                 const std::int64_t* /*offset*/, std::int64_t /*segments*/,
                 const std::int64_t* /*index*/, const void* /*weight*/, Stream /*stream*/) {
  refuse();
}
void segment_sum_backward(RowType /*type*/, void* /*grad_in*/, void* /*grad_weight*/,
                          const void* /*grad_out*/, const void* /*in*/, std::int64_t /*hidden*/,
                          const std::int64_t* /*offset*/, std::int64_t /*segments*/,
                          const std::int64_t* /*index*/, const void* /*weight*/,
                          Stream /*stream*/) {
  refuse();
}

}  // namespace lshmoe::kernels::cuda
