#pragma once
// What the CPU kernels of the ops share.

#include <torch/torch.h>

#include "lshmoe/kernels/combine.hpp"
#include "lshmoe/moe/plan.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::ops {

inline kernels::RowType row_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return kernels::RowType::f32;
    case at::kBFloat16:
      return kernels::RowType::bf16;
    case at::kDouble:
      return kernels::RowType::f64;
    default:
      throw InvalidArgument(
          detail::message("rows of dtype ", dtype, " (use float32, bfloat16 or float64)"));
  }
}
inline at::ScalarType weight_type(at::ScalarType rows) {
  return rows == at::kDouble ? at::kDouble : at::kFloat;
}

inline std::vector<int64_t> to_vector(const at::Tensor& counts) {
  const auto* data = counts.const_data_ptr<int64_t>();
  return {data, data + counts.numel()};
}

/// Sum of all but `own`.
inline int64_t sum_for_others(const at::Tensor& counts, int64_t own) {
  int64_t total = 0;
  for (int64_t r = 0; r < counts.numel(); ++r)
    if (r != own) total += counts.const_data_ptr<int64_t>()[r];
  return total;
}

/// int64 [rows received]: i.
inline at::Tensor row_numbers(int64_t rows) { return at::arange(rows, at::kLong); }

/// out[s] = sum of weight[r] in[r] over r = index[offset[s] ..]; see kernels::segment_sum.
inline at::Tensor segment_sum(const at::Tensor& in, const at::Tensor& offset,
                              const at::Tensor& index, const at::Tensor& weight) {
  at::Tensor out = at::empty({offset.size(0) - 1, in.size(1)}, in.options());
  kernels::segment_sum(row_type(in.scalar_type()), out.mutable_data_ptr(), in.const_data_ptr(),
                       in.size(1), offset.const_data_ptr<int64_t>(), offset.size(0) - 1,
                       index.const_data_ptr<int64_t>(),
                       weight.defined() ? weight.const_data_ptr() : nullptr);
  return out;
}

}  // namespace lshmoe::ops
