#include "lshmoe/moe/overlap.hpp"

#include <ATen/record_function.h>

#include <numeric>

#include "lshmoe/moe/ffn.hpp"
#include "lshmoe/moe/first_order.hpp"
#include "lshmoe/moe/lane.hpp"
#include "lshmoe/moe/ops/ops.hpp"
#include "lshmoe/moe/plan.hpp"

namespace lshmoe {
namespace {
using ops::ExchangePtr;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// One chunk of tokens on its way.
struct Chunk {
  int64_t first = 0, tokens = 0;
  ExchangePtr dispatch, combine;
  FfnShape shape;
  std::vector<at::Tensor> plan;
  at::Tensor row_weights, output, expert_output;
  FfnActivations activations;
  // Backward.
  at::Tensor grad_expert_output, grad_row_weights, grad_rows;
  FfnRowGradients gradients;
  at::Tensor grad_x, grad_weights;
};

/// One forward, for its backward. It belongs to the graph.
struct Chunks : torch::CustomClassHolder {
  std::shared_ptr<ExchangeContext> context;
  std::shared_ptr<PhaseTimer> timer;
  Activation activation = Activation::gelu;
  GroupedGemm gemm = GroupedGemm::automatic;
  int64_t top_k = 0;
  bool input_gradients = false;  // of x or the gate's weights
  std::vector<Chunk> chunks;
};

/// How many of a chunk's rows source rank s sends to local expert e, [ranks][experts].
std::vector<std::vector<int64_t>> rows_by_source(const Chunk& chunk, int64_t ranks) {
  SendPlan send;
  ReceivePlan receive;
  from_tensors(chunk.plan, ranks, send, receive);
  const auto experts = chunk.shape.rows_per_expert.size();
  std::vector<int64_t> expert_of;  // of each place among the experts' rows
  for (std::size_t e = 0; e < experts; ++e)
    expert_of.insert(expert_of.end(), static_cast<std::size_t>(chunk.shape.rows_per_expert[e]),
                     static_cast<int64_t>(e));
  std::vector<std::vector<int64_t>> counts(static_cast<std::size_t>(ranks),
                                           std::vector<int64_t>(experts, 0));
  const auto* position = receive.position.const_data_ptr<int64_t>();
  const auto* assignments = receive.assignments.const_data_ptr<int64_t>();
  for (std::size_t s = 0; s < counts.size(); ++s)
    for (int64_t a = 0; a < assignments[s]; ++a)
      ++counts[s][static_cast<std::size_t>(expert_of[static_cast<std::size_t>(*position++)])];
  return counts;
}

/// The rows of all chunks in the order one chunk of all tokens would have: expert, source rank,
/// token; blocks padded to `alignment`.
struct WholeOrder {
  std::vector<int64_t> rows_per_expert;
  at::Tensor index;  ///< into the chunks' rows, one after another; behind them stands a zero row
};

WholeOrder whole_order(const std::vector<Chunk>& chunks, int64_t ranks, int64_t experts,
                       int64_t alignment) {
  std::vector<std::vector<std::vector<int64_t>>> counts;
  std::vector<std::vector<int64_t>> next;  // [chunk][expert]: next row of the block
  int64_t rows = 0;
  for (const Chunk& chunk : chunks) {
    counts.push_back(rows_by_source(chunk, ranks));
    std::vector<int64_t>& begin = next.emplace_back();
    for (const int64_t count : chunk.shape.rows_per_expert) {
      begin.push_back(rows);
      rows += count;
    }
  }
  WholeOrder order;
  std::vector<int64_t> index;
  for (std::size_t e = 0; e < static_cast<std::size_t>(experts); ++e) {
    const std::size_t begin = index.size();
    for (std::size_t s = 0; s < static_cast<std::size_t>(ranks); ++s)
      for (std::size_t c = 0; c < chunks.size(); ++c)
        for (int64_t i = 0; i < counts[c][s][e]; ++i) index.push_back(next[c][e]++);
    while ((index.size() - begin) % static_cast<std::size_t>(alignment) != 0) index.push_back(rows);
    order.rows_per_expert.push_back(static_cast<int64_t>(index.size() - begin));
  }
  order.index = at::tensor(index, at::kLong);
  return order;
}

/// `of(chunk)`, [rows, any], of all chunks in the whole order; undefined where they are.
template <class Of>
at::Tensor reordered(const std::vector<Chunk>& chunks, const at::Tensor& index, Of of) {
  std::vector<at::Tensor> parts;
  for (const Chunk& chunk : chunks) parts.push_back(of(chunk));
  if (!parts.front().defined()) return {};
  parts.push_back(at::zeros({1, parts.front().size(1)}, parts.front().options()));
  return at::cat(parts).index_select(0, index.to(parts.front().device()));
}

class OverlappedExperts : public torch::autograd::Function<OverlappedExperts> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& topk_weights, const at::Tensor& w1,
                            const std::optional<at::Tensor>& b1, const at::Tensor& w2,
                            const std::optional<at::Tensor>& b2,
                            const std::optional<at::Tensor>& w3, const at::Tensor& topk_ids,
                            const c10::intrusive_ptr<Chunks>& state) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    std::vector<Chunk>& chunks = state->chunks;
    const FfnWeights weights{w1, b1.value_or(at::Tensor()), w2, b2.value_or(at::Tensor()),
                             w3.value_or(at::Tensor())};
    const Lanes lanes = state->context->lanes(x.device());
    lanes.give_to_exchange({x, topk_weights, topk_ids});
    const Lanes::Mark begin = lanes.mark_compute();
    lanes.exchange_after(begin);
    std::vector<Lanes::Mark> dispatched(chunks.size()), computed(chunks.size());
    std::vector<FfnActivations> activations(chunks.size());

    const auto dispatch = [&](std::size_t c) {
      Chunk& chunk = chunks[c];
      lanes.exchange([&] {
        at::Tensor tokens_per_expert;
        std::tie(chunk.activations.x, chunk.row_weights, tokens_per_expert, chunk.plan) =
            ops::dispatch(x.narrow(0, chunk.first, chunk.tokens),
                          topk_weights.narrow(0, chunk.first, chunk.tokens),
                          topk_ids.narrow(0, chunk.first, chunk.tokens), chunk.dispatch);
        const at::Tensor& blocks = chunk.plan.back();
        chunk.shape = {
            {blocks.const_data_ptr<int64_t>(), blocks.const_data_ptr<int64_t>() + blocks.numel()},
            state->activation,
            state->gemm};
      });
      lanes.give_to_compute({chunk.activations.x, chunk.row_weights});
      dispatched[c] = lanes.mark_exchange();
    };
    const auto compute = [&](std::size_t c) {
      RECORD_FUNCTION("lshmoe::experts", std::vector<c10::IValue>{});
      Chunk& chunk = chunks[c];
      lanes.compute_after(dispatched[c]);
      const PhaseTimer::Span span(*state->timer, x.device());
      chunk.expert_output =
          ffn_forward(chunk.activations.x, weights, chunk.shape, chunk.activations);
      lanes.give_to_exchange({chunk.expert_output, chunk.row_weights});
      computed[c] = lanes.mark_compute();
    };
    const auto combine = [&](std::size_t c) {
      Chunk& chunk = chunks[c];
      lanes.exchange_after(computed[c]);
      chunk.output = lanes.exchange([&] {
        return ops::combine(chunk.expert_output, chunk.row_weights, chunk.plan, chunk.combine);
      });
      lanes.give_to_compute({chunk.output});
    };
    // The experts of a chunk are queued before the host waits for an exchange: it runs beside them.
    dispatch(0);
    for (std::size_t c = 0; c < chunks.size(); ++c) {
      compute(c);
      if (c > 0) combine(c - 1);
      if (c + 1 < chunks.size()) dispatch(c + 1);
    }
    combine(chunks.size() - 1);
    lanes.compute_after(lanes.mark_exchange());

    std::vector<at::Tensor> outputs;
    for (Chunk& chunk : chunks) outputs.push_back(std::exchange(chunk.output, {}));
    ctx->save_for_backward({w1, w2, w3.value_or(at::Tensor())});
    ctx->set_materialize_grads(false);
    ctx->saved_data["state"] = c10::IValue::make_capsule(state);
    return at::cat(outputs);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    check_first_order();
    const auto state =
        c10::static_intrusive_pointer_cast<Chunks>(ctx->saved_data["state"].toCapsule());
    std::vector<Chunk>& chunks = state->chunks;
    const auto saved = ctx->get_saved_variables();
    const FfnWeights weights{saved[0], {}, saved[1], {}, saved[2]};
    const int64_t tokens = chunks.back().first + chunks.back().tokens,
                  hidden = state->context->options.hidden_size();
    const at::Tensor& any = chunks.front().expert_output;
    // Undefined counts as zeros: every rank enters every exchange.
    const at::Tensor grad_output =
        grads[0].defined() ? grads[0].contiguous() : at::zeros({tokens, hidden}, any.options());
    const Lanes lanes = state->context->lanes(any.device());
    lanes.give_to_exchange({grad_output});
    lanes.exchange_after(lanes.mark_compute());
    std::vector<Lanes::Mark> arrived(chunks.size()), computed(chunks.size());

    const auto combine_backward = [&](std::size_t c) {
      Chunk& chunk = chunks[c];
      lanes.exchange([&] {
        std::tie(chunk.grad_expert_output, chunk.grad_row_weights) = ops::combine_backward(
            grad_output.narrow(0, chunk.first, chunk.tokens), chunk.expert_output,
            chunk.row_weights, chunk.plan, chunk.combine);
      });
      lanes.give_to_compute({chunk.grad_expert_output});
      arrived[c] = lanes.mark_exchange();
    };
    const auto compute = [&](std::size_t c) {
      Chunk& chunk = chunks[c];
      lanes.compute_after(arrived[c]);
      const PhaseTimer::Span span(*state->timer, any.device());
      chunk.grad_rows =
          ffn_backward_rows(chunk.grad_expert_output, weights, chunk.shape, chunk.activations,
                            state->input_gradients, chunk.gradients);
      lanes.give_to_exchange({chunk.grad_rows});
      computed[c] = lanes.mark_compute();
    };
    const auto dispatch_backward = [&](std::size_t c) {
      if (!state->input_gradients) return;
      Chunk& chunk = chunks[c];
      lanes.exchange_after(computed[c]);
      lanes.exchange([&] {
        std::tie(chunk.grad_x, chunk.grad_weights) = ops::dispatch_backward(
            chunk.grad_rows, chunk.grad_row_weights, chunk.plan, state->top_k, chunk.dispatch);
      });
      lanes.give_to_compute({chunk.grad_x, chunk.grad_weights});
    };
    combine_backward(0);
    for (std::size_t c = 0; c < chunks.size(); ++c) {
      compute(c);
      if (c > 0) dispatch_backward(c - 1);
      if (c + 1 < chunks.size()) combine_backward(c + 1);
    }
    // Beside the last exchange: one product an expert, over the rows in the order of one chunk.
    FfnWeights d;
    {
      const PhaseTimer::Span span(*state->timer, any.device());
      const ExchangeContext& context = *state->context;
      const WholeOrder order = whole_order(chunks, context.ranks(), context.num_local_experts(),
                                           context.options.alignment());
      const auto whole = [&](auto of) { return reordered(chunks, order.index, of); };
      const FfnActivations activations{whole([](const Chunk& c) { return c.activations.x; }),
                                       {},
                                       {},
                                       whole([](const Chunk& c) { return c.activations.hidden; })};
      const FfnRowGradients gradients{whole([](const Chunk& c) { return c.gradients.output; }),
                                      whole([](const Chunk& c) { return c.gradients.pre; }),
                                      whole([](const Chunk& c) { return c.gradients.gate; })};
      d = ffn_backward_weights(activations, gradients,
                               {order.rows_per_expert, state->activation, state->gemm});
    }
    dispatch_backward(chunks.size() - 1);
    lanes.compute_after(lanes.mark_exchange());

    at::Tensor grad_x, grad_weights;
    if (state->input_gradients) {
      std::vector<at::Tensor> xs, ws;
      for (const Chunk& chunk : chunks) {
        xs.push_back(chunk.grad_x);
        ws.push_back(chunk.grad_weights);
      }
      grad_x = at::cat(xs);
      grad_weights = at::cat(ws);
    }
    for (Chunk& chunk : chunks) {  // a second backward computes them again
      chunk.gradients = {};
      for (at::Tensor* tensor : {&chunk.grad_expert_output, &chunk.grad_row_weights,
                                 &chunk.grad_rows, &chunk.grad_x, &chunk.grad_weights})
        *tensor = at::Tensor();
    }
    return {grad_x, grad_weights, d.w1, d.b1, d.w2, d.b2, d.w3, {}, {}};
  }
};

}  // namespace

at::Tensor overlapped_experts(const at::Tensor& x, const at::Tensor& topk_ids,
                              const at::Tensor& topk_weights, const ExpertsImpl& experts,
                              int64_t degree, const std::shared_ptr<ExchangeContext>& context,
                              const std::shared_ptr<ExchangeStats>& stats,
                              const std::shared_ptr<PhaseTimer>& timer,
                              std::vector<int64_t>& tokens_per_expert,
                              const std::shared_ptr<std::vector<int64_t>>& counts) {
  const FfnWeights weights = experts.weights(x.scalar_type());
  const auto state = c10::make_intrusive<Chunks>();
  state->context = context;
  state->timer = timer;
  state->activation = activation_named(experts.options.activation());
  state->gemm = grouped_gemm_named(experts.options.grouped_gemm());
  state->top_k = topk_ids.size(1);
  const bool recorded = at::GradMode::is_enabled();
  state->input_gradients = recorded && (x.requires_grad() || topk_weights.requires_grad());
  bool has_backward = state->input_gradients;
  for (const at::Tensor* weight : {&weights.w1, &weights.b1, &weights.w2, &weights.b2, &weights.w3})
    has_backward |= recorded && weight->defined() && weight->requires_grad();
  for (int64_t c = 0; c < degree; ++c) {
    Chunk& chunk = state->chunks.emplace_back();
    chunk.first = x.size(0) * c / degree;
    chunk.tokens = x.size(0) * (c + 1) / degree - chunk.first;
    chunk.dispatch = c10::make_intrusive<Exchange>(context, stats, state->input_gradients,
                                                   c == 0 ? counts : nullptr);
    chunk.combine = c10::make_intrusive<Exchange>(context, stats, has_backward);
  }
  const auto optional = [](const at::Tensor& tensor) {
    return tensor.defined() ? std::optional(tensor) : std::nullopt;
  };
  const at::Tensor y = OverlappedExperts::apply(
      x.contiguous(), topk_weights.contiguous(), weights.w1, optional(weights.b1), weights.w2,
      optional(weights.b2), optional(weights.w3), topk_ids, state);
  tokens_per_expert.assign(static_cast<std::size_t>(context->num_local_experts()), 0);
  for (const Chunk& chunk : state->chunks) {
    for (const auto& by_source : rows_by_source(chunk, context->ranks()))
      for (std::size_t e = 0; e < by_source.size(); ++e) tokens_per_expert[e] += by_source[e];
  }
  return y;
}

}  // namespace lshmoe
