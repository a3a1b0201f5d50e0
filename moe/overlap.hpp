#pragma once
// Dispatch, experts and combine in chunks of tokens, so that a chunk's codec and exchange run
// beside another's experts.

#include "lshmoe/moe/exchange.hpp"
#include "lshmoe/moe/experts.hpp"
#include "lshmoe/moe/phase_timer.hpp"

namespace lshmoe {

/// Each expert's block of rows is padded to a multiple of this in a layer with the built-in
/// experts: a row's products then do not depend on the rows beside it (see ffn_forward), nor on the
/// number of chunks.
constexpr int64_t kRowTile = 4;

/// What dispatch, the experts and combine give for all tokens at once, computed in `degree` chunks
/// of consecutive tokens: with a lossless exchange the same bits, forward and backward, for every
/// degree, as far as a row's products do not depend on the rows beside it. The weights' gradients
/// are taken once, after the last chunk, over the rows in the order that one chunk would have given
/// them. Chunks may be empty; every rank runs as many.
///
/// On a GPU the exchanges run on the context's second stream; on the CPU the chunks follow one
/// another.
///
/// x [tokens, hidden], topk_ids int64 and topk_weights [tokens, k] as Dispatcher::dispatch takes
/// them. Differentiable in x, topk_weights and the experts' parameters. Collective over the expert
/// group, and so is its backward. tokens_per_expert [num_local_experts]: added up over the chunks.
/// counts: null, or what becomes the group's sums (see Exchange).
[[nodiscard]] at::Tensor overlapped_experts(
    const at::Tensor& x, const at::Tensor& topk_ids, const at::Tensor& topk_weights,
    const ExpertsImpl& experts, int64_t degree, const std::shared_ptr<ExchangeContext>& context,
    const std::shared_ptr<ExchangeStats>& stats, const std::shared_ptr<PhaseTimer>& timer,
    std::vector<int64_t>& tokens_per_expert, const std::shared_ptr<std::vector<int64_t>>& counts);

}  // namespace lshmoe
