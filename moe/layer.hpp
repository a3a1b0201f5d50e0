#pragma once
// MoELayer = gate + Dispatcher + experts.

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "lshmoe/comm/groups.hpp"
#include "lshmoe/moe/dispatcher.hpp"
#include "lshmoe/moe/experts.hpp"
#include "lshmoe/moe/gate.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

struct MoELayerOptions {
  MoELayerOptions(int64_t hidden_size, int64_t ffn_hidden_size, int64_t num_experts)
      : hidden_size_(hidden_size), ffn_hidden_size_(ffn_hidden_size), num_experts_(num_experts) {}
  TORCH_ARG(int64_t, hidden_size);
  TORCH_ARG(int64_t, ffn_hidden_size);
  TORCH_ARG(int64_t, num_experts);  ///< global
  TORCH_ARG(int64_t, top_k) = 2;
  TORCH_ARG(std::string, activation) = "gelu";
  TORCH_ARG(std::string, score_function) = "softmax";
  // Of the router: see GateOptions.
  TORCH_ARG(std::optional<bool>, normalize_top_k) = std::nullopt;
  TORCH_ARG(int64_t, num_groups) = 1;
  TORCH_ARG(int64_t, top_k_groups) = 1;
  TORCH_ARG(double, routed_scaling_factor) = 1.0;
  TORCH_ARG(double, logit_noise) = 0.0;
  TORCH_ARG(double, capacity_factor) = 0.0;
  TORCH_ARG(std::string, drop_policy) = "probs";
  TORCH_ARG(double, aux_loss_coeff) = 0.0;
  TORCH_ARG(std::string, aux_loss_scope) = "world";
  TORCH_ARG(double, z_loss_coeff) = 0.0;
  TORCH_ARG(double, expert_bias_rate) = 0.0;
  TORCH_ARG(std::function<torch::nn::AnyModule()>, custom_gate) = nullptr;
  /// FFN width of an expert that every token passes, on its own rank; 0 = none.
  TORCH_ARG(int64_t, shared_expert_size) = 0;
  TORCH_ARG(int64_t, alignment) = 1;
  TORCH_ARG(bool, codec_on_self) = false;
  /// Chunks that the tokens are cut into, so that one's codec and exchange run beside another's
  /// experts (on a GPU; on the CPU they follow one another). With a lossless exchange output and
  /// gradients do not depend on it. For the built-in experts and restore=expert.
  TORCH_ARG(int64_t, overlap_degree) = 1;
  /// How the experts' products are computed: auto, loop or grouped; see GroupedGemm.
  TORCH_ARG(std::string, grouped_gemm) = "auto";
  /// Number of this layer in the model: separates random streams of weights and codecs. Unset: one
  /// of its own, drawn when the layer is made; see layer_number(). A number may repeat, and gives
  /// equal weights; the layers stay two (see DispatcherOptions::layer).
  TORCH_ARG(std::optional<int64_t>, layer) = std::nullopt;
  TORCH_ARG(uint64_t, seed) = 0;
  /// Makes the module of one expert from its global index, in place of the built-in experts:
  /// forward(Tensor [rows, hidden]) -> Tensor [rows, hidden], rows may be 0. Makes it on every rank
  /// from the index alone, or the model depends on the layout.
  TORCH_ARG(std::function<torch::nn::AnyModule(int64_t)>, custom_expert) = nullptr;

 public:
  /// As DispatcherOptions' setters of the same names.
  MoELayerOptions& codec(const CodecOptions& c);
  MoELayerOptions& codec_dispatch(const CodecOptions& c);
  MoELayerOptions& codec_combine(const CodecOptions& c);
  MoELayerOptions& codec_backward(const CodecOptions& c);
  [[nodiscard]] const CodecOptions& codec(Direction direction) const;
  /// The part of the options that a Dispatcher takes. With the built-in experts blocks are padded
  /// to a multiple of 4 rows too: then a row's result does not depend on the rows beside it.
  [[nodiscard]] DispatcherOptions dispatcher_options() const;

 private:
  DispatcherOptions exchange_{1, 1};  // holds the codecs only
};
/// Throws InvalidArgument naming the option, and what it clashes with.
void validate(const MoELayerOptions& options, int ep_size);

/// Statistics of one forward. backward() adds its part to the exchange and to the time.
struct MoEStats {
  std::vector<int64_t>
      tokens_per_expert;  ///< [num_local_experts] rows that reached this rank's experts
  at::Tensor load;        ///< int64 [num_experts], x's device: choices of this rank
  at::Tensor dropped;     ///< the same: of those, what capacity dropped
  at::Tensor topk_ids;    ///< int64 [tokens, top_k], x's device: as GateOutput's; to replay them
  std::shared_ptr<ExchangeStats> exchange;
  std::shared_ptr<const PhaseTimer> expert_time;
};

struct MoEOutput {
  at::Tensor output;    ///< x's shape and dtype
  at::Tensor aux_loss;  ///< scalar, already scaled by its coefficient
  at::Tensor z_loss;    ///< scalar, already scaled
  MoEStats stats;
};

/// Sub-modules: gate, experts (or expert_<global index> with custom_expert), shared_expert.
/// The shared expert's parameters have the experts' shapes with a leading dimension of 1.
class MoELayerImpl : public torch::nn::Module {
 public:
  /// Local. Throws InvalidArgument for options that do not fit each other or the groups.
  MoELayerImpl(MoELayerOptions options, ExpertGroups groups);

  /// x [tokens, hidden] or [batch, seq, hidden]; tokens may differ per rank, or be 0. inputs: a
  /// mask of padding, ids to replay; forward(x, mask) is enough for the first. Masked tokens come
  /// back as zeros. Collective over groups.expert, and so is its backward; the forward over
  /// groups.world too in training where aux_loss_coeff > 0, aux_loss_scope is world and there are
  /// several expert groups (one all_reduce of num_experts integers between them; inside a group
  /// they ride with the dispatch). Keeps no state of the forward: several forwards before a
  /// backward, accumulation and recomputation give the right gradients. Throws InvalidArgument as
  /// the gate does; rows with NaN or infinity: see Dispatcher::dispatch. Several expert groups:
  /// forward and backward go through run_together (comm/agreement.hpp).
  MoEOutput forward(const at::Tensor& x, const RouteInputs& inputs = {});

  /// See GateImpl::update_expert_bias. Collective over the world.
  void update_expert_bias();

  /// See Dispatcher::refresh_codecs. Collective over groups.expert.
  void refresh_codecs();

  /// Parameters that exist once per expert-parallel rank (the experts'); all others are shared.
  [[nodiscard]] std::vector<at::Tensor> expert_parameters() const;

  const MoELayerOptions options;
  Gate gate{nullptr};
  Experts experts{nullptr};  ///< null with custom_expert
  [[nodiscard]] const Dispatcher& dispatcher() const { return *dispatcher_; }

 private:
  ExpertGroups groups_;
  std::unique_ptr<Dispatcher> dispatcher_;
  std::vector<torch::nn::AnyModule> custom_experts_;
  Experts shared_expert_{nullptr};

  at::Tensor run_experts(const at::Tensor& rows, const std::vector<int64_t>& rows_per_expert);

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(RouteInputs())})
};
TORCH_MODULE(MoELayer);

/// The MoE layers of `model`, itself included, each once, in the order of its modules. Local.
[[nodiscard]] std::vector<MoELayerImpl*> moe_layers(torch::nn::Module& model);

/// Ends an optimizer step: update_expert_bias() and refresh_codecs() of every MoE layer of `model`.
/// Call it once a step, after the optimizer. Collective over the world: every rank holds as many
/// layers, in the same order.
void end_step(torch::nn::Module& model);

/// Ends a step that was abandoned (runtime/abandon.hpp), in place of end_step(): what its forwards
/// counted does not move a bias. Local; gradients are the caller's to discard. A learned codec
/// keeps the rows that it sampled: finite ones, which move bytes, never a bound.
void discard_step(torch::nn::Module& model);

}  // namespace lshmoe
