#pragma once
// GradientReducer: data-parallel gradient reduction that knows which parameters are experts.

#include <torch/torch.h>

#include <string>
#include <vector>

#include "lshmoe/comm/groups.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

/// After reduce() every gradient is that of the mean over ranks of the ranks' losses, whatever
/// ep_size is: shared parameters are summed over the world and divided by W; expert parameters,
/// which already received the gradients of all ranks of their expert group, are summed over the
/// replicas and divided by W. An undefined gradient counts as zeros. Assumes equal tokens per rank;
/// else scale the loss by tokens * W / sum of tokens.
///
/// Parameters that do not require a gradient are left alone; which do is looked up in each call, so
/// they may be frozen and unfrozen at any time, on all ranks alike.
class GradientReducer {
 public:
  /// Walks the modules for MoELayers; their experts' parameters are expert parameters, and so are
  /// `more_expert_parameters` (own experts behind a Dispatcher). `model` must outlive this. Checks
  /// that all ranks hold the same number and sizes of parameters, and layers of the same numbers.
  /// Collective; throws InvalidArgument on all ranks.
  GradientReducer(ExpertGroups groups, torch::nn::Module& model,
                  const std::vector<at::Tensor>& more_expert_parameters = {});

  /// Collective over the world. Equal bits on all ranks that hold a parameter. Throws
  /// InvalidArgument, on all ranks, where they disagree about what requires a gradient, and where
  /// the model's parameters are no longer the tensors that they were when this was made.
  void reduce();
  /// Scales all gradients so that the global L2 norm is at most max_norm; expert norms are summed
  /// over the expert group, shared parameters counted once. Returns the norm before clipping. Call
  /// it after reduce(). max_norm <= 0: only measures. Collective.
  double clip_grad_norm(double max_norm);

  /// Those that require a gradient now.
  [[nodiscard]] std::vector<at::Tensor> shared_parameters() const;
  [[nodiscard]] std::vector<at::Tensor> expert_parameters() const;

 private:
  struct Named {
    std::string name;  ///< dotted
    at::Tensor tensor;
  };
  static std::vector<at::Tensor> trained(const std::vector<Named>& parameters);
  static std::vector<at::Tensor> tensors(const std::vector<Named>& parameters);
  [[nodiscard]] std::string changed_parameter() const;
  void check_ranks_agree() const;
  [[nodiscard]] std::string disagreement(const std::vector<std::string>& ranks) const;

  ExpertGroups groups_;
  const torch::nn::Module* model_;
  std::vector<Named> all_;  // of the model, a tied one as often as it is listed
  std::vector<Named> shared_, expert_;
};

}  // namespace lshmoe
