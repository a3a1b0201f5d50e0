#pragma once
// kernels/combine.hpp on the GPU: the same arguments in device memory, and a stream (stream.hpp).

#include <cstdint>

#include "lshmoe/kernels/combine.hpp"
#include "lshmoe/kernels/cuda/stream.hpp"

namespace lshmoe::kernels::cuda {

/// Bits equal to the CPU's: each element is summed in the order of its segment, in float (double
/// for f64).
void segment_sum(RowType type, void* out, const void* in, std::int64_t hidden,
                 const std::int64_t* offset, std::int64_t segments, const std::int64_t* index,
                 const void* weight, Stream stream);

/// grad_in has the CPU's bits; grad_weight is summed in another fixed order.
void segment_sum_backward(RowType type, void* grad_in, void* grad_weight, const void* grad_out,
                          const void* in, std::int64_t hidden, const std::int64_t* offset,
                          std::int64_t segments, const std::int64_t* index, const void* weight,
                          Stream stream);

}  // namespace lshmoe::kernels::cuda
