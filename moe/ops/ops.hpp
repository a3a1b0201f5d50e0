#pragma once
// The torch ops, torch.ops.lshmoe.* in Python: functional schemas, tensors in and tensors out. The
// functions here are their front doors in C++. Each checks its arguments, once, in its kernel.
// Rows and weights are on the CPU or on a GPU; counts and plans on the CPU; topk_ids on either.
//
// dispatch, combine and swap_rows are differentiable; their backward ops are listed beside them.
// All of them are collective over the exchange's expert group.

#include <torch/torch.h>

#include <tuple>
#include <vector>

#include "lshmoe/moe/exchange.hpp"

namespace lshmoe::ops {

using ExchangePtr = c10::intrusive_ptr<Exchange>;

/// x [tokens, hidden], topk_weights [tokens, k], topk_ids int64 [tokens, k] -> rows [rows, hidden],
/// row_weights [rows], tokens_per_expert int64 [num_local_experts], plan (see plan.hpp).
std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> dispatch(
    const at::Tensor& x, const at::Tensor& topk_weights, const at::Tensor& topk_ids,
    const ExchangePtr& exchange);
/// Gradients of rows and row_weights -> those of x [tokens, hidden] and topk_weights [tokens, k].
std::tuple<at::Tensor, at::Tensor> dispatch_backward(const at::Tensor& grad_rows,
                                                     const at::Tensor& grad_row_weights,
                                                     at::TensorList plan, int64_t top_k,
                                                     const ExchangePtr& exchange);

/// expert_output [rows, hidden], row_weights [rows] -> [tokens, hidden].
at::Tensor combine(const at::Tensor& expert_output, const at::Tensor& row_weights,
                   at::TensorList plan, const ExchangePtr& exchange);
/// Gradient of the output -> those of expert_output and row_weights.
std::tuple<at::Tensor, at::Tensor> combine_backward(const at::Tensor& grad_output,
                                                    const at::Tensor& expert_output,
                                                    const at::Tensor& row_weights,
                                                    at::TensorList plan,
                                                    const ExchangePtr& exchange);

/// Rows as they are to their ranks, without a plan: restore=source is made of it.
/// rows [sum(rows_per_group), hidden]; rows_per_group, routed_rows and expected_rows int64 on the
/// CPU: rows by (rank, group of that rank), rows of the plan by rank, rows that must come (empty:
/// any). parcels (uint8) and parcel_bytes int64: the rows already encoded (empty: encoded here).
/// link [any]: an input without influence. direction: see Direction.
/// Returns the rows that came, by (rank, group), their numbers, the peers' routed rows, and ones
/// [rows that came] in the weights' dtype, to be the link of the way back: it makes the backward of
/// the way there run wherever that of the way back does.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> swap_rows(
    const at::Tensor& rows, const at::Tensor& link, const at::Tensor& rows_per_group,
    const at::Tensor& routed_rows, const at::Tensor& expected_rows, const at::Tensor& parcels,
    const at::Tensor& parcel_bytes, int64_t direction, const ExchangePtr& exchange);

}  // namespace lshmoe::ops
