#pragma once
// Gate: from token to experts and weights.

#include <torch/torch.h>

#include <cstdint>
#include <optional>
#include <string>

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
  /// softmax: over all experts, then top-k. sigmoid: choice by s + expert_bias, weight s / sum of
  /// the chosen s.
  TORCH_ARG(std::string, score_function) = "softmax";
  /// softmax only: divide the chosen weights by their sum. Unset: true for top_k > 1.
  TORCH_ARG(std::optional<bool>, normalize_top_k) = std::nullopt;
  /// 0 = dropless. Else each rank sends at most C = ceil(tokens * top_k / num_experts *
  /// capacity_factor) of its tokens to an expert.
  TORCH_ARG(double, capacity_factor) = 0.0;
  /// Which tokens stay when an expert is full: the most probable (probs) or the first (position).
  TORCH_ARG(std::string, drop_policy) = "probs";
  TORCH_ARG(double, aux_loss_coeff) = 0.0;
  TORCH_ARG(double, z_loss_coeff) = 0.0;
  /// sigmoid only: expert_bias += rate * sign(mean load - load) in update_expert_bias().
  TORCH_ARG(double, expert_bias_rate) = 0.0;
  /// Number of this layer in the model: separates the layers' random streams.
  TORCH_ARG(int64_t, layer) = 0;
  /// Seed of the initial weights, U(-1/sqrt(hidden), 1/sqrt(hidden)); equal on all ranks.
  TORCH_ARG(uint64_t, seed) = 0;
};

/// Throws InvalidArgument: sizes < 1, top_k > num_experts, unknown names, negative coefficients.
void validate(const GateOptions& options);

struct GateOutput {
  at::Tensor topk_ids;  ///< int64 [tokens, top_k]; -1 = dropped by capacity. Best first.
  at::Tensor
      topk_weights;  ///< fp32 (fp64 where x is) [tokens, top_k]; 0 where dropped. Differentiable.
  at::Tensor aux_loss;  ///< scalar, scaled: coeff * E/(k T) * sum_i f_i P_i; 0 without tokens
  at::Tensor z_loss;    ///< scalar, scaled: coeff * mean(logsumexp(logits)^2)
  at::Tensor load;      ///< int64 [num_experts], x's device: choices of this rank, before dropping
};

/// Parameters: weight [num_experts, hidden_size]; buffer with sigmoid: expert_bias [num_experts]
/// (fp32). Logits, scores and weights in fp32 whatever x's dtype (fp64 where x is fp64).
/// Ties go to the lowest expert index.
class GateImpl : public torch::nn::Module {
 public:
  explicit GateImpl(GateOptions options);
  /// x [tokens, hidden_size], tokens may be 0. Local.
  GateOutput forward(const at::Tensor& x);
  /// Adds rate * sign(mean load - load), the load summed over `world` since the last call. Loads
  /// are counted by forward in training with gradients enabled, so a recomputation under no_grad or
  /// an evaluation adds nothing. Collective over `world`; call it once an optimiser step. No-op for
  /// softmax.
  void update_expert_bias(Communicator& world);

  const GateOptions options;
  at::Tensor weight;
  at::Tensor expert_bias;  ///< undefined for softmax

 private:
  at::Tensor load_since_update_;
};
TORCH_MODULE(Gate);

}  // namespace lshmoe
