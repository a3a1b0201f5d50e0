#pragma once
// One forward and backward of a layer, as tests compare them.

#include <torch/torch.h>

#include <map>
#include <string>
#include <vector>

#include "tests/support/dense_moe.hpp"

namespace lshmoe::testing {

/// A run's output and the gradients of its input ("x") and of its parameters, by name.
struct LayerRun {
  at::Tensor output;
  std::map<std::string, at::Tensor> gradients;
  MoEStats stats;
};

/// A layer with round parameters (see make_round), in fp32, or in double for double rows.
[[nodiscard]] MoELayer make_layer(const MoELayerOptions& options, const ExpertGroups& groups,
                                  at::ScalarType dtype = at::kFloat);

/// Forward and backward of <output, direction> + aux_loss + z_loss, from cleared gradients.
/// Collective over the layer's expert group.
[[nodiscard]] LayerRun run_layer(MoELayer& layer, const at::Tensor& rows, at::ScalarType dtype,
                                 const at::Tensor& direction, const RouteInputs& inputs = {});

/// The input rows of a rank, and the direction of its loss.
struct RankInput {
  at::Tensor rows, direction;
};
[[nodiscard]] RankInput input_of_rank(int rank, int64_t tokens, int64_t hidden, uint64_t seed = 1);

/// What run_layer gives on this rank, by the dense loop: expert gradients come from the tokens of
/// all ranks of the expert group, all others from this rank's alone. The world's load is counted by
/// the loop too. Collective over that group and the world.
struct DenseRun {
  LayerRun run;
  std::vector<int64_t> tokens_per_expert;  ///< of this rank's experts
};
[[nodiscard]] DenseRun run_dense(const DenseLayer& dense, const MoELayerOptions& options,
                                 const ExpertGroups& groups, const RankInput& input,
                                 DenseInputs inputs = {});

/// Expects output and gradients within `tolerance` of those expected; 0: the same bits.
void expect_runs_equal(const LayerRun& got, const LayerRun& expected, double tolerance);

}  // namespace lshmoe::testing
