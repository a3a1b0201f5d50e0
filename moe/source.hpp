#pragma once
// restore=source, the paper's way (LSH-MoE, algorithm 1): groups are experts, only centroids
// travel, and each token's residual is added back where the token came from. Ordinary autograd
// around two row exchanges. On a GPU the codec is the CPU's (see compress/cuda/codec.hpp), and sums
// over rows are torch's index_add: with torch's deterministic algorithms, equal input gives equal
// bits there too.

#include "lshmoe/moe/ops/ops.hpp"

namespace lshmoe {

/// Clusters each expert's tokens and sends the centroids c: c = mean + stop_gradient(c' - mean), c'
/// as decoded. See Dispatcher::dispatch; row_weights are ones, the gate weights stay here. Rows of
/// the own rank are not clustered, but with codec_on_self.
[[nodiscard]] Dispatched dispatch_centroids(const at::Tensor& x, const at::Tensor& topk_ids,
                                            const at::Tensor& topk_weights,
                                            const ops::ExchangePtr& exchange);

/// y_t = sum over the token's experts e of w_te (E_e(c) + alpha_e (x_t - c)), c the token's
/// centroid for e, alpha_e a constant: see CodecOptions. See Dispatcher::combine.
[[nodiscard]] at::Tensor combine_centroids(const at::Tensor& expert_output,
                                           const Dispatched& dispatched,
                                           const ops::ExchangePtr& exchange);

}  // namespace lshmoe
