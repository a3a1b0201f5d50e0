#pragma once
// GradientReducer: data-parallel gradient reduction that knows which parameters are experts.

#include <torch/torch.h>

#include <vector>

#include "lshmoe/comm/groups.hpp"

namespace lshmoe {

/// After reduce() every gradient is that of the mean over ranks of the ranks' losses, whatever
/// ep_size is: shared parameters are summed over the world and divided by W; expert parameters,
/// which already received the gradients of all ranks of their expert group, are summed over the
/// replicas and divided by W. An undefined gradient counts as zeros. Assumes equal tokens per rank;
/// else scale the loss by tokens * W / sum of tokens.
class GradientReducer {
 public:
  /// Walks the modules once for MoELayers; their experts' parameters are expert parameters, and so
  /// are `more_expert_parameters` (own experts behind a Dispatcher). Parameters are held by
  /// reference. Checks that all ranks hold the same number and sizes of parameters. Collective.
  GradientReducer(ExpertGroups groups, torch::nn::Module& model,
                  const std::vector<at::Tensor>& more_expert_parameters = {});

  /// Collective over the world. Equal bits on all ranks that hold a parameter.
  void reduce();
  /// Scales all gradients so that the global L2 norm is at most max_norm; expert norms are summed
  /// over the expert group, shared parameters counted once. Returns the norm before clipping. Call
  /// it after reduce(). max_norm <= 0: only measures. Collective.
  double clip_grad_norm(double max_norm);

  [[nodiscard]] const std::vector<at::Tensor>& shared_parameters() const { return shared_; }
  [[nodiscard]] const std::vector<at::Tensor>& expert_parameters() const { return expert_; }

 private:
  ExpertGroups groups_;
  std::vector<at::Tensor> shared_, expert_;
};

}  // namespace lshmoe
