#include "tests/support/layer_runs.hpp"

#include <gtest/gtest.h>

namespace lshmoe::testing {

MoELayer make_layer(const MoELayerOptions& options, const ExpertGroups& groups,
                    at::ScalarType dtype) {
  MoELayer layer(options, groups);
  make_round(*layer);
  if (dtype == at::kDouble) layer->to(at::kDouble);
  return layer;
}

LayerRun run_layer(MoELayer& layer, const at::Tensor& rows, at::ScalarType dtype,
                   const at::Tensor& direction, const RouteInputs& inputs) {
  layer->zero_grad();
  const at::Tensor x = rows.detach().to(dtype).clone().set_requires_grad(true);
  const MoEOutput out = layer->forward(x, inputs);
  EXPECT_EQ(out.output.scalar_type(), dtype);
  ((out.output.to(at::kDouble) * direction).sum() + out.aux_loss + out.z_loss).backward();
  LayerRun run{out.output.detach(), {{"x", x.grad()}}, out.stats};
  for (const auto& parameter : layer->named_parameters())
    run.gradients[parameter.key()] =
        parameter.value().grad().defined() ? parameter.value().grad().clone() : at::Tensor();
  return run;
}

RankInput input_of_rank(int rank, int64_t tokens, int64_t hidden, uint64_t seed) {
  return {random_rows(tokens, hidden, seed, rank), random_rows(tokens, hidden, seed + 500, rank)};
}

DenseRun run_dense(const DenseLayer& dense, const MoELayerOptions& options,
                   const ExpertGroups& groups, const RankInput& input, DenseInputs inputs) {
  Communicator& expert_group = *groups.expert;
  const int64_t local = options.num_experts() / expert_group.size();
  const int64_t first = local * expert_group.rank();
  if (options.aux_loss_coeff() > 0 && options.aux_loss_scope() == "world") {
    inputs.world_load = dense.forward(input.rows, inputs).routing.load;
    groups.world->all_reduce(std::span(inputs.world_load), ReduceOp::sum, Purpose::control);
  }
  const at::Tensor x = input.rows.clone().set_requires_grad(true);
  const DenseOutput out = dense.forward(x, inputs);
  const at::Tensor loss =
      (out.output * input.direction).sum() + out.routing.aux_loss + out.routing.z_loss;
  DenseRun result;
  result.run.output = out.output.detach();

  std::vector<int64_t> tokens_per_expert;
  for (int64_t e = 0; e < options.num_experts(); ++e)
    tokens_per_expert.push_back(out.routing.ids.eq(e).sum().item<int64_t>());
  expert_group.all_reduce(std::span(tokens_per_expert), ReduceOp::sum, Purpose::control);
  result.tokens_per_expert.assign(tokens_per_expert.begin() + first,
                                  tokens_per_expert.begin() + first + local);

  std::vector<at::Tensor> leaves = {x};
  std::vector<std::string> names = {"x"};
  for (const auto& [name, leaf] : dense.parameters) {
    leaves.push_back(leaf);
    names.push_back(name);
  }
  std::vector<at::Tensor> gradients(leaves.size());
  if (loss.requires_grad()) gradients = torch::autograd::grad({loss}, leaves, {}, {}, false, true);
  for (std::size_t i = 0; i < leaves.size(); ++i) {
    at::Tensor gradient =
        gradients[i].defined() ? gradients[i].contiguous() : at::zeros_like(leaves[i]);
    if (names[i].rfind("experts.", 0) == 0) {
      expert_group.all_reduce(
          std::span(gradient.data_ptr<double>(), static_cast<std::size_t>(gradient.numel())),
          ReduceOp::sum, Purpose::control);
      gradient = gradient.narrow(0, first, local);
    }
    result.run.gradients[names[i]] = gradient;
  }
  return result;
}

void expect_runs_equal(const LayerRun& got, const LayerRun& expected, double tolerance) {
  EXPECT_LE(relative_error(got.output, expected.output), tolerance) << "output";
  EXPECT_EQ(got.gradients.size(), expected.gradients.size());
  for (const auto& [name, gradient] : expected.gradients) {
    const auto found = got.gradients.find(name);
    if (found == got.gradients.end()) {
      ADD_FAILURE() << "no gradient of " << name;
    } else {
      EXPECT_LE(relative_error(found->second, gradient), tolerance) << "gradient of " << name;
    }
  }
}

}  // namespace lshmoe::testing
