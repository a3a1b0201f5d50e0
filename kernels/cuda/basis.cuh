#pragma once
// Residuals, bounds and bases around the products with a basis.

#include "lshmoe/kernels/basis.hpp"
#include "lshmoe/kernels/cuda/basis.hpp"
#include "lshmoe/kernels/cuda/row_coder.cuh"

namespace lshmoe::kernels::cuda {

/// A block a row.
template <class T, int kThreads>
__global__ void basis_residuals_kernel(float* out, RowsOf<T> rows, std::int64_t first,
                                       std::int64_t count, std::int64_t stride,
                                       const CodedGroup* groups, std::int64_t group_count,
                                       const float* bases, const std::int32_t* id) {
  for (std::int64_t k = blockIdx.x; k < count; k += gridDim.x) {
    const std::int64_t i = first + k * stride;
    const bool named = id != nullptr &&
                       (groups == nullptr || groups[group_of(groups, group_count, i)].id_bytes > 0);
    const float* base = bases + (named ? id[i] : 0) * rows.hidden;
    const T* x = row_at(rows, i);
    for (std::int64_t j = threadIdx.x; j < rows.hidden; j += kThreads) {
      out[k * rows.hidden + j] = to_float(x[j]) - base[j];
    }
  }
}

template <int kThreads>
__global__ void coefficient_bounds_kernel(double* coded, const double* bound, const double* squared,
                                          double stretch, bool to_bfloat16, std::int64_t rows,
                                          std::int64_t hidden) {
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < rows; i += step) {
    const double left =
        coefficient_bound(bound[i], std::sqrt(squared[i]), stretch, to_bfloat16, hidden);
    coded[i] = left > 0 ? left : 0.0;
  }
}

template <int kThreads>
__global__ void coefficient_errors_kernel(double* error, const double* bound, const double* squared,
                                          const std::uint8_t* whole, double stretch,
                                          bool to_bfloat16, std::int64_t rows,
                                          std::int64_t hidden) {
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < rows; i += step) {
    if (whole[i] != 0 || squared[i] == 0) continue;
    const double left =
        coefficient_bound(bound[i], std::sqrt(squared[i]), stretch, to_bfloat16, hidden);
    error[i] = bound[i] - (left - error[i]) * stretch;
  }
}

/// A block a row.
template <class T, int kThreads>
__global__ void add_bases_kernel(T* out, const std::int64_t* index, const float* residual,
                                 const std::int32_t* base_id, const CodedGroup* groups,
                                 std::int64_t group_count, std::int64_t rows, std::int64_t hidden) {
  for (std::int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    if (base_id[i] < 0) continue;
    const float* base = groups[group_of(groups, group_count, i)].bases + base_id[i] * hidden;
    T* to = out + (index != nullptr ? index[i] : i) * hidden;
    for (std::int64_t j = threadIdx.x; j < hidden; j += kThreads) {
      to[j] = from_float<T>(base[j] + residual[i * hidden + j]);
    }
  }
}

}  // namespace lshmoe::kernels::cuda
