#pragma once
// Gate: from token to experts and weights.

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "lshmoe/comm/communicator.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

struct GateOptions {
  GateOptions(int64_t hidden_size, int64_t num_experts)
      : hidden_size_(hidden_size), num_experts_(num_experts) {}
  TORCH_ARG(int64_t, hidden_size);
  /// Experts in the whole expert-parallel group (global count).
  TORCH_ARG(int64_t, num_experts);
  TORCH_ARG(int64_t, top_k) = 2;
  /// softmax: over all experts, then top-k. sigmoid: choice by s + expert_bias, weights from s.
  TORCH_ARG(std::string, score_function) = "softmax";
  /// Divide the chosen weights by their sum. Unset: true for top_k > 1. With top_k 1 it would make
  /// every weight 1, and the router would learn nothing from the experts' outputs.
  TORCH_ARG(std::optional<bool>, normalize_top_k) = std::nullopt;
  /// The experts in num_groups blocks of consecutive ones: the top_k_groups groups are chosen
  /// first, by the sum of their two best scores (sigmoid: with expert_bias), then experts inside
  /// them (DeepSeek-V3).
  TORCH_ARG(int64_t, num_groups) = 1;
  TORCH_ARG(int64_t, top_k_groups) = 1;
  /// Multiplies the weights, after they were normalized.
  TORCH_ARG(double, routed_scaling_factor) = 1.0;
  /// Standard deviation of Gaussian noise that is added to the logits in training, for exploration:
  /// choice, weights and losses see it. It is drawn from a stream named by seed, layer and the
  /// logits themselves, so there is no state: recomputation and a resumed run draw the same noise,
  /// while ranks and steps, whose logits differ, draw their own. 0 = none. A GPU is waited for.
  TORCH_ARG(double, logit_noise) = 0.0;
  /// 0 = dropless. Else each rank sends at most C = ceil(tokens * top_k / num_experts *
  /// capacity_factor), in exact arithmetic, of its tokens to an expert. It counts the tokens of
  /// this rank's forward that take part (see RouteInputs), so what is dropped depends on how tokens
  /// are dealt to ranks.
  TORCH_ARG(double, capacity_factor) = 0.0;
  /// Which tokens stay when an expert is full: the most probable (probs) or the first (position).
  TORCH_ARG(std::string, drop_policy) = "probs";
  TORCH_ARG(double, aux_loss_coeff) = 0.0;
  /// Which tokens' choices f counts in aux = coeff * E * sum_i f_i P_i, f_i the share of all
  /// choices that went to expert i, P_i the mean probability. world: those of all ranks in this
  /// forward, P over this rank's, so that the mean over ranks is the loss of the global micro-batch
  /// (a Gate alone knows only its own, see GateImpl::aux_loss; so does a layer in eval(), whose
  /// forward therefore needs no rank beyond its expert group). rank: this rank's. sequence: each
  /// sequence's own, the mean over sequences; an x [tokens, hidden] is one sequence.
  TORCH_ARG(std::string, aux_loss_scope) = "world";
  TORCH_ARG(double, z_loss_coeff) = 0.0;
  /// sigmoid only: expert_bias += rate * sign(mean load - load) in update_expert_bias().
  TORCH_ARG(double, expert_bias_rate) = 0.0;
  /// Number of this layer in the model: separates the layers' random streams. Unset: one of its
  /// own, drawn when it is made; see layer_number().
  TORCH_ARG(std::optional<int64_t>, layer) = std::nullopt;
  /// Seed of the initial weights, U(-1/sqrt(hidden), 1/sqrt(hidden)); equal on all ranks.
  TORCH_ARG(uint64_t, seed) = 0;
  /// Makes the router's module in place of the built-in one: forward(Tensor x [tokens, hidden]) ->
  /// GateOutput, of which topk_ids and topk_weights must be set; aux_loss and z_loss may be,
  /// already scaled; load is counted from the ids. tokens may be 0; masked tokens are not among
  /// them. Its parameters are shared ones: make them the same on every rank.
  TORCH_ARG(std::function<torch::nn::AnyModule()>, custom_gate) = nullptr;
};

/// Throws InvalidArgument: sizes < 1, top_k > num_experts, unknown names, negative coefficients,
/// groups that do not fit, options that a custom gate would ignore.
void validate(const GateOptions& options);

/// What a forward may be given beside x. Made from one tensor too: forward(x, mask), or
/// forward(x, topk_ids) where it is int64. On any device; a GPU is waited for.
struct RouteInputs {
  RouteInputs(const at::Tensor& mask_or_ids = {}) {
    if (!mask_or_ids.defined()) return;
    (mask_or_ids.scalar_type() == at::kLong ? topk_ids_ : mask_) = mask_or_ids;
  }
  /// bool [tokens] or [batch, seq]: true = the token takes part. A masked one (padding) goes to no
  /// expert (ids -1), counts in no loss, load or capacity, comes back as zeros and gets no
  /// gradient, whatever stands in its row. Undefined: all take part.
  TORCH_ARG(at::Tensor, mask);
  /// int64 [tokens, top_k] or [batch, seq, top_k]: the experts to use in place of the gate's
  /// choice, -1 = none (replay of the routing of an earlier run, say of a rollout). Weights are the
  /// gate's of now, normalized over the experts given; losses take its own probabilities and the
  /// load of the ids given. Capacity drops nothing.
  TORCH_ARG(at::Tensor, topk_ids);
};

struct GateOutput {
  at::Tensor topk_ids;  ///< int64 [tokens, top_k]; -1 = dropped by capacity, or masked. Best first.
  at::Tensor topk_weights;  ///< fp32 (fp64 where x is) [tokens, top_k]; 0 where dropped or masked.
                            ///< Differentiable.
  at::Tensor aux_loss;      ///< scalar, scaled by its coefficient; 0 without tokens
  at::Tensor z_loss;        ///< scalar, scaled: coeff * mean(logsumexp(logits)^2)
  at::Tensor load;     ///< int64 [num_experts], x's device: choices of this rank, before dropping
  at::Tensor dropped;  ///< int64 [num_experts], beside load: of those, what capacity dropped
  /// [num_experts]: mean over this rank's tokens of the (normalized) scores. Differentiable.
  /// Undefined where aux_loss_coeff is 0, and with a custom gate.
  at::Tensor mean_probability;
};

/// Parameters: weight [num_experts, hidden_size]; buffer with sigmoid: expert_bias [num_experts].
/// Logits, scores and weights in fp32 whatever x's dtype (fp64 where x is fp64). Weight and bias
/// stay fp32 in a model that is moved to a narrower dtype (fp64 where it is moved to fp64).
///
/// A softmax is ordered by its logits, and weights are softmaxes of logits, or of the logarithms of
/// sigmoids: finite, gradients too, for any finite logits. Ties go to the lowest expert index.
/// Sigmoids tie where they round to the same number (fp32: all logits above 17 give 1, below -88
/// all give 0); expert_bias decides then.
class GateImpl : public torch::nn::Module {
 public:
  explicit GateImpl(GateOptions options);
  /// x [tokens, hidden_size] or [batch, seq, hidden_size] -> tokens = batch * seq; may be 0. Local.
  /// Throws InvalidArgument for inputs of other shapes or dtypes, ids out of range or repeated in a
  /// token, and parameters of another size, as a file of another model leaves them.
  GateOutput forward(const at::Tensor& x, const RouteInputs& inputs = {});
  /// coeff * E * sum_i f_i P_i with P = out.mean_probability and f from `load` int64 [num_experts],
  /// a load summed over more ranks, say the world's. Where ranks hold unequal numbers of tokens,
  /// scale it with the rest of a rank's loss by tokens * W / sum of tokens (as GradientReducer
  /// says). Differentiable in P. Local.
  [[nodiscard]] at::Tensor aux_loss(const GateOutput& out, const at::Tensor& load) const;
  /// Adds rate * sign(mean load - load), the load summed over `world` since the last call. Loads
  /// are counted by forward in training with gradients enabled, so a recomputation under no_grad or
  /// an evaluation adds nothing. Collective over `world`; call it once an optimizer step. No-op for
  /// softmax.
  void update_expert_bias(Communicator& world);

  /// Forgets the loads counted since the last update: those of a step that was abandoned. Local.
  void discard_load();

  // As of any module, but weight and bias become no narrower than fp32.
  using torch::nn::Module::to;
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;

  const GateOptions options;
  at::Tensor weight;       ///< undefined with custom_gate
  at::Tensor expert_bias;  ///< undefined for softmax

 private:
  struct Tokens;
  std::mutex load_mutex_;  // threads may share a layer's forward
  at::Tensor load_since_update_;
  torch::nn::AnyModule custom_;

  [[nodiscard]] at::ScalarType kept_dtype(at::ScalarType dtype) const;
  [[nodiscard]] at::Tensor aux_loss_of_sequences(const Tokens& tokens, const at::Tensor& p,
                                                 const at::Tensor& ids) const;
  GateOutput route(const Tokens& tokens, const at::Tensor& rows, const at::Tensor& given_ids);
  GateOutput route_custom(const at::Tensor& rows);

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(RouteInputs())})
};
TORCH_MODULE(Gate);

}  // namespace lshmoe
