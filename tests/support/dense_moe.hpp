#pragma once
// A mixture-of-experts layer as one loop over tokens, in double, written from the formulas: what
// gate, experts and layer are tested against. Plain autograd gives its gradients.

#include <torch/torch.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "lshmoe/moe/layer.hpp"

namespace lshmoe::testing {

struct DenseRouting {
  at::Tensor ids;      ///< int64 [tokens, k]; -1 = dropped or masked
  at::Tensor weights;  ///< [tokens, k]; 0 where dropped or masked
  at::Tensor aux_loss, z_loss;
  std::vector<int64_t> load;  ///< [num_experts]: choices before dropping
};

/// What a forward is given beside x, as RouteInputs, and what else the losses depend on.
struct DenseInputs {
  at::Tensor mask;                  ///< bool [tokens]; undefined: all take part
  at::Tensor topk_ids;              ///< int64 [tokens, k]; undefined: the gate chooses
  int64_t sequences = 1;            ///< for aux_loss_scope sequence
  std::vector<int64_t> world_load;  ///< for aux_loss_scope world; empty: these tokens' own load
};

/// x [tokens, hidden] and weight [num_experts, hidden] in double; bias [num_experts], for sigmoid.
/// Noise and custom gates are not in it.
[[nodiscard]] DenseRouting dense_gate(const at::Tensor& x, const at::Tensor& weight,
                                      const at::Tensor& bias, const GateOptions& options,
                                      const DenseInputs& inputs = {});

struct DenseOutput {
  at::Tensor output;
  DenseRouting routing;
};

/// All experts of a layer on one rank.
class DenseLayer {
 public:
  /// The initial parameters of MoELayer(options), made round (see below).
  explicit DenseLayer(const MoELayerOptions& options);
  /// x [tokens, hidden], double.
  [[nodiscard]] DenseOutput forward(const at::Tensor& x, const DenseInputs& inputs = {}) const;

  /// Double leaves under the names of MoELayer's parameters, those of all experts in one.
  std::map<std::string, at::Tensor> parameters;
  at::Tensor expert_bias;

 private:
  MoELayerOptions options_;
  GateOptions gate_options_;
};

/// Rounds the parameters to what bfloat16 holds, so that models of different dtypes are the same
/// and only their arithmetic differs.
void make_round(torch::nn::Module& module);

/// Values of bfloat16 in double [tokens, hidden], the same on every rank that asks for them.
[[nodiscard]] at::Tensor random_rows(int64_t tokens, int64_t hidden, uint64_t seed, int rank);

/// Largest error relative to the largest element expected; 0 for empty tensors of equal shape,
/// infinite for different shapes.
[[nodiscard]] double relative_error(const at::Tensor& got, const at::Tensor& expected);

}  // namespace lshmoe::testing
