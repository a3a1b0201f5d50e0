#pragma once
// Summing rows by segments, with weights: what combine does with the outputs of a token's experts.
//
// Host pointers; nothing is kept after the call. Offsets and index values are the caller's to
// check. Loops of fixed order: equal input gives equal bits.

#include <cstdint>

namespace lshmoe::kernels {

/// Element type of rows. Sums and weights are float, double for f64.
enum class RowType : std::uint8_t { f32, bf16, f64 };

/// out[s] = sum over j in [offset[s], offset[s + 1]) of weight[r] * in[r], r = index[j].
/// out [segments, hidden], in [any, hidden] of `type`; weight [any] float (double for f64), or null
/// for ones; index null: r = j. A segment of none gives a zero row.
void segment_sum(RowType type, void* out, const void* in, std::int64_t hidden,
                 const std::int64_t* offset, std::int64_t segments, const std::int64_t* index,
                 const void* weight);

/// The gradients of segment_sum: grad_in[r] = weight[r] * grad_out[s] and
/// grad_weight[r] = <grad_out[s], in[r]>, for every r of every segment s. Rows that no segment
/// names are left alone. grad_in or grad_weight may be null.
void segment_sum_backward(RowType type, void* grad_in, void* grad_weight, const void* grad_out,
                          const void* in, std::int64_t hidden, const std::int64_t* offset,
                          std::int64_t segments, const std::int64_t* index, const void* weight);

}  // namespace lshmoe::kernels
