#pragma once
// The decoder-only transformer language model that lshmoe-train trains.

#include <torch/torch.h>

#include <cstdint>
#include <vector>

#include "lshmoe/comm/groups.hpp"
#include "lshmoe/moe/layer.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::launch {

struct LanguageModelOptions {
  /// `moe`: the options of every MoE layer; its hidden_size is the model's, its `layer` is set by
  /// the model to the block's number.
  LanguageModelOptions(int64_t vocab_size, MoELayerOptions moe)
      : vocab_size_(vocab_size), moe_(std::move(moe)) {}
  TORCH_ARG(int64_t, vocab_size);
  TORCH_ARG(MoELayerOptions, moe);
  TORCH_ARG(int64_t, layers) = 2;
  TORCH_ARG(int64_t, heads) = 4;
  TORCH_ARG(int64_t, dense_ffn_hidden_size) = 512;
  /// Blocks moe_every, 2 moe_every, ... (counted from 1) have an MoE layer in place of the dense
  /// feed-forward network.
  TORCH_ARG(int64_t, moe_every) = 2;
  /// float32, or bfloat16: activations and products in bf16; master weights, norms' statistics,
  /// router and loss in fp32.
  TORCH_ARG(at::ScalarType, dtype) = at::kFloat;
  /// Of the initial weights.
  TORCH_ARG(uint64_t, seed) = 0;
};
/// Throws InvalidArgument naming the option and what to do.
void validate(const LanguageModelOptions& options, int ep_size);

struct LanguageModelOutput {
  at::Tensor loss;  ///< scalar fp32: mean cross entropy of this rank's tokens, nats
  at::Tensor aux_loss = at::zeros({});  ///< scalar: sum over the MoE layers, already scaled
  at::Tensor z_loss = at::zeros({});    ///< the same
  std::vector<MoEStats> stats;          ///< one per MoE layer
  std::vector<at::Tensor> blocks;  ///< what each block returns, detached; none without autograd
};

/// Pre-norm (LayerNorm without bias), rotary positions, causal attention, gelu feed-forward
/// networks without biases, output projection tied to the embedding.
/// Initial weights depend on (seed, place in the model) only, so every layout starts from the same
/// model.
class LanguageModelImpl : public torch::nn::Module {
 public:
  /// Local. Throws InvalidArgument.
  LanguageModelImpl(LanguageModelOptions options, const ExpertGroups& groups);

  /// windows int64 [batch, seq_len + 1]: the first seq_len tokens are read, the last seq_len
  /// predicted; on the parameters' device. batch >= 1. Collective over groups.expert, and so is its
  /// backward.
  LanguageModelOutput forward(const at::Tensor& windows);

  /// tokens int64 [batch, length] -> logits fp32 [batch, length, vocab_size]; position t sees
  /// tokens 0 .. t only. Adds the MoE layers' losses and statistics to `out`. Collective as
  /// forward.
  at::Tensor logits(const at::Tensor& tokens, LanguageModelOutput& out);

  /// See GateImpl::update_expert_bias. Collective over the world.
  void update_expert_bias();
  /// See Dispatcher::refresh_codecs. Collective over groups.expert.
  void refresh_codecs();
  /// Learned state of one exchange of each MoE layer. Local.
  [[nodiscard]] std::vector<StateStats> state_stats(Direction direction) const;

  const LanguageModelOptions options;

 private:
  struct Block {
    at::Tensor attention_norm, qkv, attention_out, ffn_norm;
    at::Tensor ffn_in, ffn_out;  ///< undefined with `moe`
    MoELayer moe{nullptr};
  };
  at::Tensor embedding_, final_norm_;
  std::vector<Block> blocks_;
  at::Tensor rotation_;  ///< complex64 [positions, 1, head_dim / 2]; grows with the sequences seen

  at::Tensor add_weight(const std::string& name, at::IntArrayRef sizes, double std);
  at::Tensor linear(const at::Tensor& x, const at::Tensor& weight) const;
  at::Tensor norm(const at::Tensor& x, const at::Tensor& weight) const;
  at::Tensor attention(const at::Tensor& x, const Block& block);
};
TORCH_MODULE(LanguageModel);

}  // namespace lshmoe::launch
