#pragma once
// Starting kernels. The tests put another `launch` in place of this one (cuda_on_host.hpp).

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "lshmoe/kernels/cuda/stream.hpp"
#include "lshmoe/kernels/lanes.hpp"

#if defined(__CUDACC__)
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::kernels::cuda {

inline void check(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  throw CudaError(lshmoe::detail::message(what, ": ", cudaGetErrorString(code), " (CUDA error ",
                                          static_cast<int>(code), ")"));
}

/// Queues kernel<<<grid, block, shared>>>(arguments...). Nothing when the grid is empty.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int block,
            std::size_t shared, Stream stream, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
  if (shared > 48 * 1024) {
    check(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
        name);
  }
  kernel<<<grid, block, shared, stream>>>(arguments...);
  check(cudaGetLastError(), name);
}

}  // namespace lshmoe::kernels::cuda
#endif

namespace lshmoe::kernels::cuda {

/// Blocks of a launch over `count` units at most; loops take the rest in strides of the grid.
/// Set by set_grid_limit (grid.hpp).
int grid_limit();

inline dim3 grid_for(std::int64_t units, std::int64_t per_block) {
  const std::int64_t blocks = (units + per_block - 1) / per_block;
  return dim3(static_cast<unsigned>(std::min<std::int64_t>(blocks, grid_limit())));
}

/// Calls f(threads of a block) for rows of `hidden` values that a block sums.
template <class F>
void with_lanes(std::int64_t hidden, F f) {
  if (lanes_of(hidden) == kFewLanes) {
    f(std::integral_constant<int, kFewLanes>{});
  } else {
    f(std::integral_constant<int, kManyLanes>{});
  }
}

}  // namespace lshmoe::kernels::cuda
