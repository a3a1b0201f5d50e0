#pragma once
// Experts: the feed-forward networks of one rank, computed group by group.

#include <torch/torch.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "lshmoe/moe/ffn.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

struct ExpertsOptions {
  ExpertsOptions(int64_t hidden_size, int64_t ffn_hidden_size, int64_t num_local_experts)
      : hidden_size_(hidden_size),
        ffn_hidden_size_(ffn_hidden_size),
        num_local_experts_(num_local_experts) {}
  TORCH_ARG(int64_t, hidden_size);
  TORCH_ARG(int64_t, ffn_hidden_size);
  TORCH_ARG(int64_t, num_local_experts);
  /// Global index of the first local expert: each expert's initial weights depend only on its
  /// global index, the seed and the layer, so any ep_size starts from the same model.
  TORCH_ARG(int64_t, first_expert) = 0;
  /// relu | gelu (exact) | swiglu
  TORCH_ARG(std::string, activation) = "gelu";
  /// auto | loop | grouped: see GroupedGemm.
  TORCH_ARG(std::string, grouped_gemm) = "auto";
  /// As GateOptions::layer.
  TORCH_ARG(std::optional<int64_t>, layer) = std::nullopt;
  TORCH_ARG(uint64_t, seed) = 0;
};
void validate(const ExpertsOptions& options);

/// Initial weights and biases are U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as torch's Linear draws them.
/// relu/gelu: y = w2 act(w1 x + b1) + b2. swiglu: y = w2 (silu(w1 x) * (w3 x)), no biases.
/// Parameters: w1 [E, ffn, hidden], b1 [E, ffn], w2 [E, hidden, ffn], b2 [E, hidden]; swiglu: w1,
/// w3 [E, ffn, hidden], w2.
class ExpertsImpl : public torch::nn::Module {
 public:
  explicit ExpertsImpl(ExpertsOptions options);
  /// rows [sum(rows_per_expert), hidden], expert-major. An expert without rows still gets (zero)
  /// gradients. Local.
  at::Tensor forward(const at::Tensor& rows, const std::vector<int64_t>& rows_per_expert);
  /// The parameters cast to the dtype of the rows; differentiable. Throws InvalidArgument where
  /// they have other sizes than the options say, as a file of another ep_size leaves them.
  [[nodiscard]] FfnWeights weights(at::ScalarType dtype) const;

  const ExpertsOptions options;
  at::Tensor w1, b1, w2, b2, w3;
};
TORCH_MODULE(Experts);

}  // namespace lshmoe
