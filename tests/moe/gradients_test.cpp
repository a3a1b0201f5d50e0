// GradientReducer: whatever ep_size is, the gradients are those of the mean loss of the global
// batch.

#include "lshmoe/moe/gradients.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "lshmoe/moe/layer.hpp"
#include "tests/support/errors.hpp"
#include "tests/support/layer_runs.hpp"
#include "tests/support/main.hpp"

namespace lshmoe {
namespace {
using testing::DenseLayer;
using testing::expect_error;
using testing::input_of_rank;
using testing::make_layer;
using testing::RankInput;
using testing::relative_error;
using testing::run_dense;
using testing::run_layer;
using testing::world;

constexpr int64_t kHidden = 8, kExperts = 8;

MoELayerOptions small() {
  return MoELayerOptions(kHidden, 12, kExperts).top_k(2).shared_expert_size(4).seed(4).layer(0);
}

/// A model with a layer somewhere inside.
struct Model : torch::nn::Module {
  explicit Model(MoELayer moe_layer) : layer(std::move(moe_layer)) {
    before = register_module("before", torch::nn::Linear(kHidden, kHidden));
    inner->push_back(layer);
    register_module("inner", inner);
  }
  torch::nn::Linear before{nullptr};
  torch::nn::Sequential inner;
  MoELayer layer;
};

bool is_expert(const std::string& name) { return name.rfind("experts.", 0) == 0; }

void sum_over_world(at::Tensor& gradient) {
  world()->all_reduce(
      std::span(gradient.data_ptr<double>(), static_cast<std::size_t>(gradient.numel())),
      ReduceOp::sum, Purpose::control);
}

/// Gradients of (1 / tokens of the world) * sum of <y_t, direction_t>, for all experts, by the
/// dense loop.
std::map<std::string, at::Tensor> global_mean_gradients(const RankInput& input, double tokens) {
  const ExpertGroups alone = make_expert_groups(world(), 1);
  auto gradients = run_dense(DenseLayer(small()), small(), alone, input).run.gradients;
  gradients.erase("x");
  for (auto& [name, gradient] : gradients) {
    sum_over_world(gradient);
    gradient.div_(tokens);
  }
  return gradients;
}

class ReducerTest : public ::testing::TestWithParam<bool> {};

TEST_P(ReducerTest, GivesTheGradientOfTheGlobalMeanInAnyLayout) {
  const bool equal_tokens = GetParam();
  const int ranks = world()->size(), rank = world()->rank();
  std::vector<int64_t> tokens_of_rank;
  int64_t total = 0;
  for (int r = 0; r < ranks; ++r) {
    tokens_of_rank.push_back(equal_tokens ? 6 : std::array{5, 0, 17, 1}[r % 4]);
    total += tokens_of_rank.back();
  }
  const RankInput input = input_of_rank(rank, tokens_of_rank[rank], kHidden);
  const auto expected = global_mean_gradients(input, static_cast<double>(total));
  for (int ep = 1; ep <= ranks; ep *= 2) {
    for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
      SCOPED_TRACE(::testing::Message() << "ep_size " << ep << ", " << dtype);
      const ExpertGroups groups = make_expert_groups(world(), ep);
      Model model(make_layer(small(), groups, dtype));
      GradientReducer reducer(groups, model);
      // The rank's loss is the mean over its tokens, scaled by tokens * W / total.
      (void)run_layer(model.layer, input.rows, dtype,
                      input.direction * static_cast<double>(ranks) / static_cast<double>(total));
      reducer.reduce();
      const int64_t local = kExperts / ep;
      for (const auto& parameter : model.layer->named_parameters()) {
        const std::string& name = parameter.key();
        at::Tensor want = expected.at(name);
        if (is_expert(name)) want = want.narrow(0, local * groups.expert->rank(), local);
        EXPECT_LE(relative_error(parameter.value().grad(), want),
                  dtype == at::kDouble ? 1e-12 : 1e-5)
            << name;
        // Equal bits wherever the parameter lives.
        Communicator& holders = is_expert(name) ? *groups.replica : *world();
        at::Tensor first = parameter.value().grad().clone();
        holders.broadcast(first.data_ptr(), first.nbytes(), 0, Purpose::control);
        EXPECT_TRUE(at::equal(first, parameter.value().grad())) << name;
      }
      // Nothing flowed to the Linear: that counts as zeros.
      EXPECT_TRUE(at::equal(model.before->weight.grad(), at::zeros_like(model.before->weight)));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tokens, ReducerTest, ::testing::Values(true, false),
                         [](const auto& info) { return info.param ? "Equal" : "Uneven"; });

TEST(GradientReducer, SortsParameters) {
  const ExpertGroups groups = make_expert_groups(world());
  Model model(make_layer(small(), groups));
  model.before->bias.set_requires_grad(false);
  at::Tensor own_expert = at::zeros({3}).set_requires_grad(true);
  const GradientReducer reducer(groups, model, {own_expert});
  // Linear weight, gate, shared expert's w1 b1 w2 b2; experts' four and the one given.
  EXPECT_EQ(reducer.shared_parameters().size(), 6U);
  EXPECT_EQ(reducer.expert_parameters().size(), 5U);
  EXPECT_TRUE(reducer.expert_parameters().back().is_same(own_expert));
  // A layer that is the whole model.
  MoELayer layer(small(), groups);
  EXPECT_EQ(GradientReducer(groups, *layer).expert_parameters().size(), 4U);
}

TEST(GradientReducer, TiedParametersAreReducedOnce) {
  struct Tied : torch::nn::Module {
    Tied() {
      weight = register_parameter("weight", at::zeros({4}));
      register_parameter("same", weight);
    }
    at::Tensor weight;
  } model;
  GradientReducer reducer(make_expert_groups(world()), model);
  model.weight.mutable_grad() = at::full({4}, static_cast<float>(world()->rank() + 1));
  reducer.reduce();
  const double mean = (world()->size() + 1) / 2.0;
  EXPECT_TRUE(at::allclose(model.weight.grad(), at::full({4}, mean))) << model.weight.grad();
  EXPECT_NEAR(reducer.clip_grad_norm(0), 2 * mean, 1e-6);
}

TEST(GradientReducer, UndefinedGradientsCountAsZeros) {
  const int ranks = world()->size(), rank = world()->rank();
  for (int ep = 1; ep <= ranks; ep *= 2) {
    SCOPED_TRACE(ep);
    const ExpertGroups groups = make_expert_groups(world(), ep);
    MoELayer layer(small(), groups);
    GradientReducer reducer(groups, *layer);
    // Only the last rank has gradients: ones.
    if (rank == ranks - 1) {
      for (at::Tensor& parameter : layer->parameters())
        parameter.mutable_grad() = at::ones_like(parameter);
    }
    reducer.reduce();
    EXPECT_TRUE(
        at::allclose(layer->gate->weight.grad(), at::full_like(layer->gate->weight, 1.0 / ranks)));
    const bool replica_of_last = groups.expert->rank() == ep - 1;
    EXPECT_TRUE(at::allclose(layer->experts->w1.grad(),
                             at::full_like(layer->experts->w1, replica_of_last ? 1.0 / ranks : 0)));
  }
}

void backward(MoELayer& layer, uint64_t seed) {
  at::Generator stream =
      at::make_generator<at::CPUGeneratorImpl>(seed + 100 * static_cast<uint64_t>(world()->rank()));
  for (at::Tensor& parameter : layer->parameters()) parameter.mutable_grad() = at::Tensor();
  layer->forward(at::randn({6, kHidden}, stream)).output.square().mean().backward();
}

// A frozen parameter has no gradient and keeps its value; one that is unfrozen is reduced again.
TEST(GradientReducer, FollowsWhatRequiresAGradientNow) {
  for (int ep = 1; ep <= world()->size(); ep *= 2) {
    SCOPED_TRACE(ep);
    const ExpertGroups groups = make_expert_groups(world(), ep);
    MoELayer layer(small(), groups);
    at::Tensor gate = layer->gate->weight, w1 = layer->experts->w1;
    w1.set_requires_grad(false);  // frozen from the beginning
    GradientReducer reducer(groups, *layer);
    torch::optim::AdamW optimizer(layer->parameters(),
                                  torch::optim::AdamWOptions(0.01).weight_decay(0.1));
    const auto step = [&](uint64_t seed) {
      backward(layer, seed);
      reducer.reduce();
      const double norm = reducer.clip_grad_norm(1e-3);
      double squares = 0;
      for (const at::Tensor& p : reducer.shared_parameters())
        squares += p.grad().square().sum().item<double>();
      EXPECT_GT(norm, 0);
      EXPECT_LT(std::sqrt(squares), 1.001e-3);  // it was clipped
      optimizer.step();
    };
    for (const bool freeze : {true, false, true}) {
      gate.set_requires_grad(!freeze);
      w1.set_requires_grad(freeze);
      const at::Tensor gate_before = gate.detach().clone(), w1_before = w1.detach().clone();
      for (uint64_t i = 0; i < 3; ++i) {
        step(i);
        EXPECT_EQ(gate.grad().defined(), !freeze);
        EXPECT_EQ(w1.grad().defined(), freeze);
      }
      EXPECT_EQ(at::equal(gate.detach(), gate_before), freeze);
      EXPECT_EQ(at::equal(w1.detach(), w1_before), !freeze);
      EXPECT_EQ(reducer.shared_parameters().size(), freeze ? 4U : 5U);  // and the shared expert's
      EXPECT_EQ(reducer.expert_parameters().size(), freeze ? 4U : 3U);
      // Equal on all ranks that hold it.
      at::Tensor first = gate.detach().clone();
      world()->broadcast(first.data_ptr(), first.nbytes(), 0, Purpose::control);
      EXPECT_TRUE(at::equal(first, gate.detach()));
    }
    // Gradients of before are not touched where the parameter is frozen.
    gate.mutable_grad() = at::ones_like(gate);
    reducer.reduce();
    static_cast<void>(reducer.clip_grad_norm(1e-6));
    EXPECT_TRUE(at::equal(gate.grad(), at::ones_like(gate)));
  }
}

TEST(GradientReducer, NamesTheParameterThatRanksDisagreeAbout) {
  if (world()->size() == 1) GTEST_SKIP() << "needs peers";
  const int last = world()->size() - 1;
  const bool odd = world()->rank() == last;
  const ExpertGroups groups = make_expert_groups(world(), 1);
  Model model(MoELayer(small(), groups));
  GradientReducer reducer(groups, model);
  const std::string rank = " on rank " + std::to_string(last);
  for (const bool frozen : {true, false}) {
    model.layer->gate->weight.set_requires_grad(frozen != odd);
    expect_error("parameter 'inner.0.gate.weight' " +
                     (frozen ? "is frozen" + rank + ", but requires a gradient on rank 0"
                             : "requires a gradient" + rank + ", but is frozen on rank 0") +
                     " (their gradients could not be added)",
                 [&] { reducer.reduce(); });
  }
  model.layer->gate->weight.set_requires_grad(true);
  at::Tensor& w2 = model.layer->experts->w2;
  w2.set_requires_grad(!odd);
  expect_error("parameter 'inner.0.experts.w2' is frozen" + rank, [&] { reducer.reduce(); });
  w2.set_requires_grad(true);
  reducer.reduce();  // all is well again
  if (world()->size() < 4) return;
  // Experts of ranks that hold others need not agree.
  const ExpertGroups pairs = make_expert_groups(world(), 2);
  MoELayer layer(small(), pairs);
  GradientReducer of_pairs(pairs, *layer);
  layer->experts->w1.set_requires_grad(world()->rank() % 2 == 0);
  of_pairs.reduce();
  layer->experts->w1.set_requires_grad(world()->rank() != 2);
  expect_error("parameter 'experts.w1' is frozen on rank 2, but requires a gradient on rank 0",
               [&] { of_pairs.reduce(); });
}

// Custom experts are as many and as large as their makers want, and have names of their own.
struct OddExpertImpl : torch::nn::Module {
  explicit OddExpertImpl(int64_t index) {
    for (int64_t i = 0; i <= index; ++i) {
      scales.push_back(register_parameter("scale" + std::to_string(i), at::ones({1})));
    }
  }
  at::Tensor forward(const at::Tensor& x) {
    at::Tensor y = x;
    for (const at::Tensor& scale : scales) y = y * scale;
    return y;
  }
  std::vector<at::Tensor> scales;
};
TORCH_MODULE(OddExpert);

TEST(GradientReducer, NamesTheCustomExpertOfTheRankThatHasIt) {
  if (world()->size() < 4) GTEST_SKIP() << "needs replicas of two ranks";
  const ExpertGroups groups = make_expert_groups(world(), 2);
  MoELayer layer(MoELayerOptions(kHidden, 1, 2).top_k(1).custom_expert([](int64_t index) {
    return torch::nn::AnyModule(OddExpert(index));
  }),
                 groups);
  GradientReducer reducer(groups, *layer);
  if (world()->rank() == 3) layer->expert_parameters().back().set_requires_grad(false);
  expect_error("parameter 'expert_1.scale1' is frozen on rank 3, but requires a gradient on rank 1",
               [&] { reducer.reduce(); });
}

// Replicas that never exchange rows would train different weights.
TEST(GradientReducer, RefusesLayersOfDifferentNumbers) {
  if (world()->size() == 1) GTEST_SKIP() << "needs peers";
  const ExpertGroups groups = make_expert_groups(world(), 1);
  MoELayer layer(MoELayerOptions(kHidden, 12, kExperts), groups);
  const GradientReducer fits(groups, *layer);
  const int last = world()->size() - 1;
  const bool odd = world()->rank() == last;
  MoELayer other(MoELayerOptions(kHidden, 12, kExperts).layer(odd ? 1 : 0), groups);
  expect_error("the MoE layers of rank " + std::to_string(last) +
                   " have other numbers than rank 0's (each replica would start from other "
                   "weights): make the same layers in the same order on every rank",
               [&] { const GradientReducer reducer(groups, *other); });
}

TEST(GradientReducer, RefusesParametersThatAreNoLongerItsOwn) {
  const ExpertGroups groups = make_expert_groups(world());
  const int last = world()->size() - 1;
  const auto refused = [&](const std::string& name, auto change) {
    Model model(MoELayer(small(), groups));
    GradientReducer reducer(groups, model);
    reducer.reduce();
    if (world()->rank() == last) change(model);  // on one rank alone: all of them throw
    expect_error("parameter '" + name + "' of rank " + std::to_string(last) +
                     " is no longer what it was when the GradientReducer was made",
                 [&] { reducer.reduce(); });
  };
  refused("before.weight", [](Model& model) {
    model.replace_module("before", torch::nn::Linear(kHidden, kHidden));
  });
  refused("before.weight", [](Model& model) { model.unregister_module("before"); });
  refused("late", [](Model& model) { model.register_parameter("late", at::zeros({2})); });
  refused("inner.1.weight", [](Model& model) {
    model.inner->push_back(torch::nn::LayerNorm(torch::nn::LayerNormOptions({kHidden})));
  });
}

TEST(GradientReducer, ClipsByTheNormOfTheWholeModel) {
  const int ranks = world()->size();
  const RankInput input = input_of_rank(world()->rank(), 6, kHidden);
  double squares = 0;  // shared parameters once, every expert once
  for (const auto& [name, gradient] : global_mean_gradients(input, 6.0 * ranks))
    squares += gradient.square().sum().item<double>();
  const double expected = std::sqrt(squares);
  for (int ep = 1; ep <= ranks; ep *= 2) {
    SCOPED_TRACE(ep);
    const ExpertGroups groups = make_expert_groups(world(), ep);
    MoELayer layer = make_layer(small(), groups, at::kDouble);
    GradientReducer reducer(groups, *layer);
    (void)run_layer(layer, input.rows, at::kDouble, input.direction / 6);
    reducer.reduce();
    const auto copies = [&] {
      std::vector<at::Tensor> gradients;
      for (const at::Tensor& parameter : layer->parameters())
        gradients.push_back(parameter.grad().clone());
      return gradients;
    };
    const auto before = copies();
    const auto expect_scaled = [&](double scale) {
      const auto after = copies();
      for (std::size_t i = 0; i < after.size(); ++i) {
        EXPECT_LE(relative_error(after[i], before[i] * scale), scale == 1 ? 0 : 1e-13);
      }
    };
    EXPECT_NEAR(reducer.clip_grad_norm(0), expected, 1e-12 * expected);
    expect_scaled(1);
    EXPECT_NEAR(reducer.clip_grad_norm(2 * expected), expected, 1e-12 * expected);
    expect_scaled(1);
    EXPECT_NEAR(reducer.clip_grad_norm(0.25 * expected), expected, 1e-12 * expected);
    expect_scaled(0.25);
    EXPECT_NEAR(reducer.clip_grad_norm(0), 0.25 * expected, 1e-12 * expected);
  }
}

void expect_refused(const ExpertGroups& groups, torch::nn::Module& model, const std::string& what,
                    int odd = 1, int first = 0) {
  expect_error("the " + what + " parameters of rank " + std::to_string(odd) +
                   " differ in number, size or dtype from rank " + std::to_string(first) +
                   "'s (their gradients could not be added): build the same model on every rank",
               [&] { const GradientReducer reducer(groups, model); });
}

TEST(GradientReducer, RefusesDifferentModels) {
  if (world()->size() == 1) GTEST_SKIP() << "needs peers";
  const bool odd = world()->rank() == 1;
  const ExpertGroups groups = make_expert_groups(world()),
                     replicas = make_expert_groups(world(), 1);
  torch::nn::Linear wider(4, odd ? 5 : 4);
  expect_refused(groups, *wider, "shared");
  torch::nn::Linear without_bias(torch::nn::LinearOptions(4, 4).bias(!odd));
  expect_refused(groups, *without_bias, "shared");
  torch::nn::Linear of_double(4, 4);
  if (odd) of_double->to(at::kDouble);
  expect_refused(groups, *of_double, "shared");
  MoELayer larger(MoELayerOptions(4, odd ? 9 : 8, 4), replicas);
  expect_refused(replicas, *larger, "expert");
  if (world()->size() < 4) return;
  // Ranks 1 and 3 are replicas; ranks 0 and 2 must not go on without them.
  const ExpertGroups pairs = make_expert_groups(world(), 2);
  MoELayer other(MoELayerOptions(4, world()->rank() == 3 ? 9 : 8, 4), pairs);
  expect_refused(pairs, *other, "expert", 3, 1);
}

}  // namespace
}  // namespace lshmoe
