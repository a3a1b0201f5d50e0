#pragma once
// What the kernels of the ops share.

#include <torch/torch.h>

#include "lshmoe/kernels/combine.hpp"
#include "lshmoe/moe/device_rows.hpp"
#include "lshmoe/moe/plan.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::ops {

inline at::ScalarType weight_type(at::ScalarType rows) {
  return rows == at::kDouble ? at::kDouble : at::kFloat;
}

/// Throws InvalidArgument for rows of a dtype or on a device that the ops do not take.
inline void check_rows(const at::Tensor& rows) {
  (void)row_type(rows.scalar_type());
  LSHMOE_VALIDATE(rows.is_cpu() || rows.is_cuda(), "rows on ", rows.device(),
                  " (must be on the CPU or a CUDA device)");
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

}  // namespace lshmoe::ops
