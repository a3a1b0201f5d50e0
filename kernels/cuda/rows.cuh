#pragma once
// Picking, scattering and converting rows.

#include "lshmoe/kernels/cuda/vector.cuh"

namespace lshmoe::kernels::cuda {

/// Copies rows of `units` Units: to[to_index[i]] = from[from_index[i]] (null: i). A block a row.
template <class Unit>
__global__ void copy_rows_kernel(Unit* to, const std::int64_t* to_index, const Unit* from,
                                 const std::int64_t* from_index, std::int64_t rows,
                                 std::int64_t units) {
  for (std::int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    Unit* out = to + (to_index != nullptr ? to_index[i] : i) * units;
    const Unit* in = from + (from_index != nullptr ? from_index[i] : i) * units;
    for (std::int64_t j = threadIdx.x; j < units; j += blockDim.x) out[j] = in[j];
  }
}

__device__ inline Bfloat16 converted(float value) { return to_bfloat16(value); }
__device__ inline float converted(Bfloat16 value) { return to_float(value); }

/// kValues elements at a time, the last ones one by one.
template <class To, class From, int kValues>
__global__ void convert_kernel(To* out, const From* in, std::int64_t count) {
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  const std::int64_t first = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (std::int64_t i = first; i < count / kValues; i += stride) {
    const Vector<From, kValues> from = load<kValues>(in + i * kValues);
    Vector<To, kValues> to;
    for (int j = 0; j < kValues; ++j) to.value[j] = converted(from.value[j]);
    store(out + i * kValues, to);
  }
  for (std::int64_t i = count / kValues * kValues + first; i < count; i += stride) {
    out[i] = converted(in[i]);
  }
}

}  // namespace lshmoe::kernels::cuda
