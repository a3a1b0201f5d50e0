// The gate against the router formulas, written as a loop over tokens in double.

#include "lshmoe/moe/gate.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <sstream>

#include "tests/support/dense_moe.hpp"
#include "tests/support/errors.hpp"
#include "tests/support/main.hpp"

namespace lshmoe {
namespace {
using testing::dense_gate;
using testing::DenseInputs;
using testing::DenseRouting;
using testing::expect_error;
using testing::random_rows;
using testing::relative_error;
using testing::world;

constexpr int64_t kHidden = 12, kExperts = 8;

at::Tensor own_rows(int64_t tokens, uint64_t seed = 1) {
  return random_rows(tokens, kHidden, seed, world()->rank());
}

/// Sets the gate's weight, [num_experts, hidden].
void set_weight(Gate& gate, const at::Tensor& weight) {
  const at::NoGradGuard no_grad;
  gate->weight.copy_(weight);
}

/// A gate whose logits are its input.
Gate logits_gate(GateOptions options) {
  Gate gate(options.hidden_size(options.num_experts()));
  set_weight(gate, at::eye(options.num_experts()));
  return gate;
}

struct Routed {
  GateOutput got;
  DenseRouting expected;
};

/// What the loop is given, for the gate.
RouteInputs inputs_of(const DenseInputs& inputs) {
  return RouteInputs(inputs.mask).topk_ids(inputs.topk_ids);
}

/// Output and gradients of `gate` are those of the loop. The rows are inputs.sequences sequences.
Routed expect_dense(Gate& gate, const at::Tensor& rows, at::ScalarType dtype, double tolerance,
                    const DenseInputs& inputs = {}) {
  gate->to(dtype);
  const at::Tensor x = rows.to(dtype).set_requires_grad(true);
  const at::Tensor exact_x = x.detach().to(at::kDouble).set_requires_grad(true);
  const at::Tensor exact_weight =
      gate->weight.detach().to(at::kDouble).clone().set_requires_grad(true);
  Routed r;
  r.got = gate->forward(x.view({inputs.sequences, -1, rows.size(1)}), inputs_of(inputs));
  r.expected = dense_gate(exact_x, exact_weight, gate->expert_bias, gate->options, inputs);
  EXPECT_TRUE(at::equal(r.got.topk_ids, r.expected.ids));
  EXPECT_EQ(r.got.topk_weights.scalar_type(), dtype == at::kDouble ? at::kDouble : at::kFloat);
  EXPECT_LE(relative_error(r.got.topk_weights, r.expected.weights), tolerance);
  EXPECT_LE(relative_error(r.got.aux_loss, r.expected.aux_loss), tolerance);
  EXPECT_LE(relative_error(r.got.z_loss, r.expected.z_loss), tolerance);
  EXPECT_TRUE(at::equal(r.got.load, at::tensor(r.expected.load, at::kLong)));

  const at::Tensor direction = random_rows(rows.size(0), gate->options.top_k(), 99, 0);
  const auto loss = [&](const at::Tensor& weights, const at::Tensor& aux, const at::Tensor& z) {
    return (weights * direction.to(weights.scalar_type())).sum() + aux + z;
  };
  const auto got = torch::autograd::grad({loss(r.got.topk_weights, r.got.aux_loss, r.got.z_loss)},
                                         {x, gate->weight});
  const auto expected = torch::autograd::grad(
      {loss(r.expected.weights, r.expected.aux_loss, r.expected.z_loss)}, {exact_x, exact_weight});
  EXPECT_EQ(got[0].scalar_type(), dtype);
  if (inputs.mask.defined()) {
    const at::Tensor masked = got[0].index({inputs.mask.logical_not()});
    EXPECT_TRUE(at::equal(masked, at::zeros_like(masked)));
  }
  const double input_tolerance = dtype == at::kBFloat16 ? 4e-3 : 5 * tolerance;
  EXPECT_LE(relative_error(got[0], expected[0]), input_tolerance);
  EXPECT_LE(relative_error(got[1], expected[1]), 5 * tolerance);
  return r;
}

class GateTest : public ::testing::TestWithParam<std::tuple<const char*, int, int>> {};

TEST_P(GateTest, EqualsTheFormulas) {
  const auto [score, k, normalize] = GetParam();
  GateOptions options = GateOptions(kHidden, kExperts)
                            .layer(0)
                            .top_k(k)
                            .score_function(score)
                            .aux_loss_coeff(0.7)
                            .z_loss_coeff(0.3)
                            .seed(5);
  if (normalize >= 0) options.normalize_top_k(normalize == 1);
  for (const int64_t tokens : {1, 33}) {
    for (const at::ScalarType dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
      SCOPED_TRACE(::testing::Message() << tokens << " tokens, " << dtype);
      Gate gate(options);
      if (gate->expert_bias.defined()) gate->expert_bias.uniform_(-0.2, 0.2);
      expect_dense(gate, own_rows(tokens), dtype, dtype == at::kDouble ? 1e-13 : 2e-6);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, GateTest,
                         ::testing::Combine(::testing::Values("softmax", "sigmoid"),
                                            ::testing::Values(1, 2, 3, 8),
                                            ::testing::Values(-1, 0, 1)));

TEST(Gate, TiesGoToTheLowestIndex) {
  for (const char* score : {"softmax", "sigmoid"}) {
    Gate gate = logits_gate(GateOptions(1, 100).top_k(3).score_function(score));
    at::Tensor logits = at::zeros({3, 100});
    logits[1][70] = logits[1][13] = 2;  // two before all others
    logits[2][99] = 1;
    const at::Tensor ids = gate->forward(logits).topk_ids;
    EXPECT_TRUE(at::equal(ids, at::tensor({0, 1, 2, 13, 70, 0, 99, 0, 1}, at::kLong).view({3, 3})))
        << ids;
  }
}

TEST(Gate, NormalizesForMoreThanOneChoiceUnlessTold) {
  const at::Tensor logits = at::tensor({std::log(4.0), std::log(3.0), std::log(2.0), 0.0})
                                .to(at::kDouble)
                                .view({1, 4});  // probabilities 0.4, 0.3, 0.2, 0.1
  const auto weights = [&](int64_t k, std::optional<bool> normalize) {
    Gate gate = logits_gate(GateOptions(1, 4).top_k(k).normalize_top_k(normalize));
    gate->to(at::kDouble);
    return gate->forward(logits).topk_weights.detach();
  };
  const auto row = [](std::vector<double> w) { return at::tensor(w, at::kDouble).view({1, -1}); };
  EXPECT_LE(relative_error(weights(1, std::nullopt), row({0.4})), 1e-15);
  EXPECT_LE(relative_error(weights(1, true), row({1.0})), 1e-15);
  EXPECT_LE(relative_error(weights(2, std::nullopt), row({4. / 7, 3. / 7})), 1e-15);
  EXPECT_LE(relative_error(weights(2, false), row({0.4, 0.3})), 1e-15);
}

TEST(Gate, BiasMovesTheChoiceNeverTheWeight) {
  Gate gate = logits_gate(GateOptions(1, 4).top_k(2).score_function("sigmoid"));
  const at::Tensor logits = at::tensor({2.F, 1.F, 0.F, -1.F}).view({1, 4});
  const at::Tensor score = at::sigmoid(logits).view(-1);
  EXPECT_TRUE(
      at::equal(gate->forward(logits).topk_ids, at::tensor({0, 1}, at::kLong).view({1, 2})));
  gate->expert_bias[3] = 1.0;  // sigmoid(-1) + 1 is before sigmoid(2)
  const GateOutput out = gate->forward(logits);
  EXPECT_TRUE(at::equal(out.topk_ids, at::tensor({3, 0}, at::kLong).view({1, 2}))) << out.topk_ids;
  const at::Tensor chosen = at::stack({score[3], score[0]});
  EXPECT_LE(relative_error(out.topk_weights, (chosen / chosen.sum()).view({1, 2})), 1e-6);
}

TEST(Gate, BiasUpdateSumsTheLoadOverTheWorld) {
  const int64_t ranks = world()->size(), rank = world()->rank();
  Gate gate =
      logits_gate(GateOptions(1, 4).top_k(1).score_function("sigmoid").expert_bias_rate(0.25));
  // Expert 0: 4 tokens of every rank; expert 1: all of rank 0's others; expert 2: 3 of every rank.
  const auto choose = [&](std::vector<int64_t> ids) {
    const at::Tensor logits =
        at::one_hot(at::tensor(ids, at::kLong), 4).to(at::kFloat).set_requires_grad(true);
    return gate->forward(logits);
  };
  std::vector<int64_t> ids = {0, 0, 0, 0, 2, 2, 2};
  if (rank == 0) ids.insert(ids.end(), 40, 1);
  (void)choose(ids);
  {
    const at::NoGradGuard no_grad;  // the first run of a recomputation
    (void)choose(std::vector<int64_t>(500, 2));
  }
  gate->eval();
  (void)choose(std::vector<int64_t>(500, 2));
  gate->train();

  gate->update_expert_bias(*world());
  const double load[] = {4. * static_cast<double>(ranks), 40, 3. * static_cast<double>(ranks), 0};
  const double mean = (load[0] + load[1] + load[2]) / 4;
  std::vector<double> expected;
  for (const double l : load) expected.push_back(l < mean ? 0.25 : l > mean ? -0.25 : 0);
  EXPECT_TRUE(at::equal(gate->expert_bias, at::tensor(expected).to(at::kFloat)))
      << gate->expert_bias;
  EXPECT_LT(gate->expert_bias[1].item<float>(), 0);  // the crowded one
  EXPECT_GT(gate->expert_bias[3].item<float>(), 0);  // the empty one

  const at::Tensor before = gate->expert_bias.clone();
  gate->update_expert_bias(*world());  // the load was used up
  EXPECT_TRUE(at::equal(gate->expert_bias, before));
  Gate softmax(GateOptions(kHidden, kExperts).layer(0));
  softmax->update_expert_bias(*world());
  EXPECT_FALSE(softmax->expert_bias.defined());
}

TEST(Gate, AuxLossIsItsCoefficientWhenBalancedAndGrowsWithImbalance) {
  const auto aux = [](const at::Tensor& logits, int64_t k, const char* score) {
    Gate gate = logits_gate(GateOptions(1, 4).top_k(k).score_function(score).aux_loss_coeff(0.5));
    gate->to(at::kDouble);
    return gate->forward(logits.to(at::kDouble)).aux_loss.item<double>();
  };
  const at::Tensor balanced = 3 * at::eye(4).repeat({5, 1});  // each expert has 5 of 20 tokens
  EXPECT_NEAR(aux(balanced, 1, "softmax"), 0.5, 1e-12);
  EXPECT_NEAR(aux(balanced, 1, "sigmoid"), 0.5, 1e-12);
  EXPECT_NEAR(aux(at::zeros({7, 4}), 2, "softmax"), 0.5, 1e-12);  // equal probabilities
  at::Tensor crowded = at::zeros({9, 4});
  crowded.select(1, 2).fill_(100);
  EXPECT_NEAR(aux(crowded, 1, "softmax"), 0.5 * 4, 1e-12);
}

TEST(Gate, AuxLossGradient) {
  // d aux / d logit_tj = coeff E / (k T^2) p_tj (f_j - sum_i f_i p_ti), the counts f being
  // constant.
  const double coeff = 0.5;
  const int64_t k = 2, tokens = 21;
  Gate gate = logits_gate(GateOptions(1, kExperts).top_k(k).aux_loss_coeff(coeff));
  gate->to(at::kDouble);
  const at::Tensor logits = random_rows(tokens, kExperts, 3, 0).set_requires_grad(true);
  const GateOutput out = gate->forward(logits);
  const at::Tensor got = torch::autograd::grad({out.aux_loss}, {logits})[0];
  const at::Tensor p = at::softmax(logits.detach(), 1), f = out.load.to(at::kDouble);
  const at::Tensor expected = coeff * kExperts / static_cast<double>(k * tokens * tokens) * p *
                              (f.unsqueeze(0) - p.mv(f).unsqueeze(1));
  EXPECT_LE(relative_error(got, expected), 1e-13);
}

TEST(Gate, ZLossValueAndGradient) {
  // z = coeff / T sum_t lse_t^2; d z / d logit_tj = 2 coeff / T lse_t p_tj.
  const double coeff = 0.25;
  const int64_t tokens = 9;
  Gate gate = logits_gate(GateOptions(1, kExperts).top_k(2).z_loss_coeff(coeff));
  gate->to(at::kDouble);
  const at::Tensor logits = (10 * random_rows(tokens, kExperts, 4, 0)).set_requires_grad(true);
  const GateOutput out = gate->forward(logits);
  const at::Tensor exponentials = at::exp(logits.detach());
  const at::Tensor lse = at::log(exponentials.sum(1));
  EXPECT_LE(relative_error(out.z_loss, coeff * (lse * lse).sum() / tokens), 1e-13);
  EXPECT_LE(relative_error(
                torch::autograd::grad({out.z_loss}, {logits})[0],
                2 * coeff / tokens * lse.unsqueeze(1) * exponentials / exponentials.sum(1, true)),
            1e-13);
  // Large logits must not overflow.
  const double large =
      gate->forward(at::full({1, kExperts}, 1e4, at::kDouble)).z_loss.item<double>();
  EXPECT_NEAR(large, coeff * std::pow(1e4 + std::log(8.0), 2), 1e-4);
}

class CapacityTest : public ::testing::TestWithParam<std::tuple<const char*, const char*, double>> {
};

TEST_P(CapacityTest, KeepsAtMostCOfEachExpert) {
  const auto [policy, score, factor] = GetParam();
  const int64_t k = 2;
  const GateOptions options = GateOptions(kHidden, kExperts)
                                  .layer(0)
                                  .top_k(k)
                                  .score_function(score)
                                  .drop_policy(policy)
                                  .capacity_factor(factor)
                                  .aux_loss_coeff(0.7)
                                  .seed(5);
  for (const int64_t tokens : {1, 4, 33}) {
    SCOPED_TRACE(tokens);
    Gate gate(options);
    GateOptions dropless_options = options;
    Gate dropless(dropless_options.capacity_factor(0));
    const Routed routed = expect_dense(gate, own_rows(tokens, 2), at::kFloat, 2e-6);
    const GateOutput& out = routed.got;
    const GateOutput all = dropless->forward(own_rows(tokens, 2).to(at::kFloat));
    const auto capacity =
        static_cast<int64_t>(std::ceil(static_cast<double>(tokens * k) / kExperts * factor));
    const at::Tensor kept = out.topk_ids >= 0;
    const at::Tensor counts = at::bincount(out.topk_ids.index({kept}), {}, kExperts);
    EXPECT_TRUE(at::equal(counts, all.load.clamp_max(capacity))) << counts << " of " << all.load;
    // What is kept is untouched, what is dropped weighs nothing, and the losses see all choices.
    EXPECT_TRUE(at::equal(out.topk_ids, at::where(kept, all.topk_ids, -1)));
    EXPECT_TRUE(at::equal(out.topk_weights, at::where(kept, all.topk_weights, 0.0)));
    EXPECT_TRUE(at::equal(out.load, all.load));
    EXPECT_TRUE(at::equal(out.dropped, all.load - counts));
    EXPECT_TRUE(at::equal(all.dropped, at::zeros_like(all.load)));
    EXPECT_TRUE(at::equal(out.aux_loss, all.aux_loss));
  }
}

INSTANTIATE_TEST_SUITE_P(Policies, CapacityTest,
                         ::testing::Combine(::testing::Values("probs", "position"),
                                            ::testing::Values("softmax", "sigmoid"),
                                            ::testing::Values(0.25, 1.0, 1.5, 100.0)));

TEST(Gate, DropPolicies) {
  // All of four tokens want expert 0, the later the more; C = ceil(4 * 1 / 2 * 1) = 2.
  const at::Tensor logits = at::tensor({1.F, 0.F, 2.F, 0.F, 3.F, 0.F, 4.F, 0.F}).view({4, 2});
  const auto kept = [&](const char* policy, const at::Tensor& input) {
    Gate gate = logits_gate(GateOptions(1, 2).top_k(1).capacity_factor(1).drop_policy(policy));
    return gate->forward(input).topk_ids.view(-1);
  };
  EXPECT_TRUE(at::equal(kept("position", logits), at::tensor({0, 0, -1, -1}, at::kLong)));
  EXPECT_TRUE(at::equal(kept("probs", logits), at::tensor({-1, -1, 0, 0}, at::kLong)));
  // Equally probable tokens: the first stay.
  EXPECT_TRUE(at::equal(kept("probs", at::zeros({4, 2})), at::tensor({0, 0, -1, -1}, at::kLong)));
}

TEST(Gate, RoutesInFp32UnderBfloat16) {
  Gate gate(GateOptions(kHidden, 2).top_k(1).z_loss_coeff(1));
  // Experts whose weights differ by less than bfloat16 shows: in bfloat16 they would tie.
  at::Tensor weight = at::ones({2, kHidden});
  weight[1] += 1e-3;
  set_weight(gate, weight);
  const at::Tensor x = at::ones({5, kHidden}, at::kBFloat16);
  ASSERT_TRUE(at::equal(weight[0].to(at::kBFloat16), weight[1].to(at::kBFloat16)));
  const GateOutput out = gate->forward(x), wide = gate->forward(x.to(at::kFloat));
  EXPECT_TRUE(at::equal(out.topk_ids, at::ones({5, 1}, at::kLong))) << out.topk_ids;
  EXPECT_EQ(out.topk_weights.scalar_type(), at::kFloat);
  EXPECT_EQ(out.z_loss.scalar_type(), at::kFloat);
  EXPECT_TRUE(at::equal(out.topk_weights, wide.topk_weights));
  EXPECT_TRUE(at::equal(out.z_loss, wide.z_loss));
}

TEST(Gate, FarOffLogitsGiveFiniteWeightsAndGradients) {
  const std::vector<std::vector<double>> rows = {
      {-80, -80, -80, -80},         {-90, -90, -91, -95},         {-1e4, -1e4, -1e4 - 1, -1e4},
      {-1e30, -2e30, 0, 1e30},      {-1e30, -1e30, -1e30, -1e30}, {1e30, 1e30, 1e30, 1e30},
      {-3e38, 3e38, -3e38, 3e38},   {-3e38, -3e38, -3e38, -3e38}, {700, 710, 720, 730},
      {-1e30, -1e30, -1e30, -1e29}, {-88, -87.5, -104, 3},        {30, 31, -750, -751}};
  const auto count = static_cast<int64_t>(rows.size());
  for (const char* score : {"softmax", "sigmoid"}) {
    for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
      for (int64_t r = 0; r < count; ++r) {
        SCOPED_TRACE(::testing::Message() << score << ", " << dtype << ", row " << r);
        // All experts are chosen: their order may differ where scores round to the same number.
        Gate gate = logits_gate(
            GateOptions(1, 4).top_k(4).score_function(score).aux_loss_coeff(0.5).capacity_factor(
                0.75));
        gate->to(dtype);
        const at::Tensor logits = at::tensor(rows[static_cast<std::size_t>(r)], at::kDouble)
                                      .view({1, 4})
                                      .to(dtype)
                                      .set_requires_grad(true);
        const at::Tensor exact = logits.detach().to(at::kDouble).set_requires_grad(true);
        const GateOutput got = gate->forward(logits);
        const DenseRouting expected =
            dense_gate(exact, at::eye(4, at::kDouble), at::zeros({4}), gate->options, {});
        const auto by_expert = [](const at::Tensor& ids, const at::Tensor& weights) {
          return at::zeros({1, 4}, weights.options()).scatter(1, ids, weights);
        };
        const at::Tensor w = by_expert(got.topk_ids, got.topk_weights),
                         exact_w = by_expert(expected.ids, expected.weights);
        const double tolerance = dtype == at::kDouble ? 1e-12 : 1e-5;
        EXPECT_LE(relative_error(w, exact_w), tolerance) << w << exact_w;
        EXPECT_NEAR(w.sum().item<double>(), 1, 1e-6);
        EXPECT_LE(relative_error(got.aux_loss, expected.aux_loss), tolerance);
        const at::Tensor direction = at::tensor({100., -100., 30., 7.}, at::kDouble).view({1, 4});
        const auto gradient = [&](const at::Tensor& weights, const at::Tensor& aux,
                                  const at::Tensor& of) {
          return torch::autograd::grad(
              {(weights * direction.to(weights.scalar_type())).sum() + aux}, {of})[0];
        };
        const at::Tensor g = gradient(w, got.aux_loss, logits);
        EXPECT_TRUE(g.isfinite().all().item<bool>()) << g;
        // Some are tiny; what they are added to is of the size of `direction`.
        const at::Tensor exact_g = gradient(exact_w, expected.aux_loss, exact);
        EXPECT_LE((g.to(at::kDouble) - exact_g).abs().max().item<double>(), 100 * tolerance)
            << g << exact_g;
      }
    }
  }
}

TEST(Gate, FarOffLogitsKeepTheirOrder) {
  // All probabilities but one are 0 in a float; softmax still takes the next best.
  Gate gate = logits_gate(GateOptions(1, 6).top_k(3));
  const at::Tensor logits = at::tensor({-1e30F, -3e4F, 1e30F, -2e4F, -5e3F, -1e5F}).view({1, 6});
  EXPECT_TRUE(
      at::equal(gate->forward(logits).topk_ids, at::tensor({2, 4, 3}, at::kLong).view({1, 3})));
  // Pairs: {-1e30, -3e4}, {1e30, -2e4}, {-5e3, -1e5}; by the greater of two sums that round to 0.
  Gate grouped = logits_gate(GateOptions(1, 6).top_k(4).num_groups(3).top_k_groups(2));
  EXPECT_TRUE(at::equal(grouped->forward(logits).topk_ids,
                        at::tensor({2, 4, 3, 5}, at::kLong).view({1, 4})));
}

class GroupsTest : public ::testing::TestWithParam<std::tuple<const char*, int, int, int>> {};

TEST_P(GroupsTest, EqualTheFormulas) {
  const auto [score, groups, best, k] = GetParam();
  const GateOptions options = GateOptions(kHidden, kExperts)
                                  .layer(0)
                                  .top_k(k)
                                  .score_function(score)
                                  .num_groups(groups)
                                  .top_k_groups(best)
                                  .routed_scaling_factor(2.5)
                                  .aux_loss_coeff(0.7)
                                  .z_loss_coeff(0.3)
                                  .seed(6);
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    SCOPED_TRACE(dtype);
    Gate gate(options);
    if (gate->expert_bias.defined())
      gate->expert_bias.copy_(0.2 * random_rows(1, kExperts, 8, 0).view(-1));
    const Routed r = expect_dense(gate, own_rows(33), dtype, dtype == at::kDouble ? 1e-13 : 2e-6);
    const at::Tensor group = r.got.topk_ids.div(kExperts / groups, "floor");
    for (int64_t t = 0; t < group.size(0); ++t)
      EXPECT_LE(std::get<0>(at::_unique(group[t])).numel(), best);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cases, GroupsTest,
    ::testing::Values(std::tuple("softmax", 4, 2, 3), std::tuple("softmax", 2, 1, 2),
                      std::tuple("softmax", 8, 3, 2), std::tuple("sigmoid", 4, 2, 3),
                      std::tuple("sigmoid", 2, 1, 4), std::tuple("sigmoid", 8, 8, 1)));

TEST(Gate, GroupsAreChosenByTheSumOfTheirTwoBest) {
  // The best expert is 0, but 2 and 3 together are better; of three, the third does not count.
  const at::Tensor pairs = at::tensor({0.9F, -9.F, 0.8F, 0.7F}).view({1, 4});
  const at::Tensor triples = at::tensor({.5F, .5F, .5F, .6F, .6F, -9.F}).view({1, 6});
  for (const char* score : {"softmax", "sigmoid"}) {
    SCOPED_TRACE(score);
    const auto ids = [&](const at::Tensor& logits) {
      Gate gate = logits_gate(GateOptions(1, logits.size(1))
                                  .top_k(2)
                                  .score_function(score)
                                  .num_groups(2)
                                  .top_k_groups(1));
      return gate->forward(logits).topk_ids;
    };
    EXPECT_TRUE(at::equal(ids(pairs), at::tensor({2, 3}, at::kLong).view({1, 2})));
    EXPECT_TRUE(at::equal(ids(triples), at::tensor({3, 4}, at::kLong).view({1, 2})));
  }
}

TEST(Gate, MaskedTokensHaveNoPart) {
  for (const char* score : {"softmax", "sigmoid"}) {
    for (const char* scope : {"world", "sequence"}) {
      for (const double capacity : {0.0, 0.75}) {
        SCOPED_TRACE(::testing::Message() << score << " " << scope << " " << capacity);
        const GateOptions options = GateOptions(kHidden, kExperts)
                                        .layer(0)
                                        .top_k(3)
                                        .score_function(score)
                                        .aux_loss_coeff(0.7)
                                        .aux_loss_scope(scope)
                                        .z_loss_coeff(0.3)
                                        .capacity_factor(capacity)
                                        .expert_bias_rate(score[1] == 'i' ? 0.1 : 0)
                                        .seed(5);
        at::Tensor rows = own_rows(24);
        DenseInputs inputs;
        inputs.sequences = 4;
        inputs.mask = own_rows(24, 9).select(1, 0) > -0.3;
        inputs.mask.slice(0, 6, 12).fill_(false);  // a sequence of padding alone
        rows.masked_fill_(inputs.mask.logical_not().unsqueeze(1), NAN);
        Gate gate(options);
        const Routed r = expect_dense(gate, rows, at::kFloat, 2e-6, inputs);
        EXPECT_EQ(r.got.load.sum().item<int64_t>(), 3 * inputs.mask.sum().item<int64_t>());

        // The mask in the other shape, and no mask at all where it masks nothing.
        const at::Tensor x = rows.to(at::kFloat).view({4, 6, kHidden});
        EXPECT_TRUE(
            at::equal(gate->forward(x, inputs.mask.view({4, 6})).topk_weights, r.got.topk_weights));
        const at::Tensor whole = own_rows(24, 3).to(at::kFloat);
        const GateOutput plain = gate->forward(whole),
                         unmasked = gate->forward(whole, at::ones({24}, at::kBool));
        EXPECT_TRUE(at::equal(plain.topk_ids, unmasked.topk_ids));
        EXPECT_TRUE(at::equal(plain.topk_weights, unmasked.topk_weights));
        EXPECT_TRUE(at::equal(plain.aux_loss, unmasked.aux_loss));
        const GateOutput nothing = gate->forward(x, at::zeros({24}, at::kBool));
        EXPECT_TRUE(nothing.topk_ids.eq(-1).all().item<bool>());
        EXPECT_EQ(nothing.aux_loss.item<double>() + nothing.z_loss.item<double>(), 0);
      }
    }
  }
}

TEST(Gate, AuxLossOfSequencesIsTheMeanOverThem) {
  const GateOptions options = GateOptions(kHidden, kExperts)
                                  .layer(0)
                                  .top_k(2)
                                  .aux_loss_coeff(0.7)
                                  .aux_loss_scope("sequence")
                                  .seed(5);
  for (const char* score : {"softmax", "sigmoid"}) {
    Gate gate(GateOptions(options).score_function(score)),
        one(GateOptions(options).score_function(score).aux_loss_scope("rank"));
    DenseInputs inputs;
    inputs.sequences = 3;
    const at::Tensor rows = own_rows(27);
    const Routed r = expect_dense(gate, rows, at::kDouble, 1e-13, inputs);
    one->to(at::kDouble);
    at::Tensor sum = at::zeros({}, at::kDouble);
    for (const at::Tensor& sequence : rows.view({3, 9, kHidden}).unbind())
      sum += one->forward(sequence).aux_loss.detach();
    EXPECT_LE(relative_error(r.got.aux_loss, sum / 3), 1e-13);
    // Rows alone are one sequence.
    EXPECT_LE(relative_error(gate->forward(rows).aux_loss, one->forward(rows).aux_loss), 1e-13);
  }
}

TEST(Gate, AuxLossTakesALoadOfMoreRanks) {
  Gate gate(GateOptions(kHidden, kExperts).layer(0).top_k(2).aux_loss_coeff(0.7).seed(5));
  gate->to(at::kDouble);
  const at::Tensor a = own_rows(9, 1), b = own_rows(9, 2);
  const GateOutput of_a = gate->forward(a), of_b = gate->forward(b),
                   whole = gate->forward(at::cat({a, b}));
  const at::Tensor load = of_a.load + of_b.load;
  EXPECT_LE(
      relative_error((gate->aux_loss(of_a, load) + gate->aux_loss(of_b, load)) / 2, whole.aux_loss),
      1e-13);
  EXPECT_EQ(relative_error(gate->aux_loss(whole, whole.load), whole.aux_loss), 0);
  Gate without(GateOptions(kHidden, kExperts).layer(0));
  const GateOutput none = without->forward(a);
  expect_error("this gate has no aux loss", [&] { (void)without->aux_loss(none, none.load); });
}

TEST(Gate, ReplaysGivenIds) {
  for (const char* score : {"softmax", "sigmoid"}) {
    for (const bool normalize : {true, false}) {
      SCOPED_TRACE(::testing::Message() << score << " " << normalize);
      const GateOptions options = GateOptions(kHidden, kExperts)
                                      .layer(0)
                                      .top_k(2)
                                      .score_function(score)
                                      .normalize_top_k(normalize)
                                      .routed_scaling_factor(1.5)
                                      .aux_loss_coeff(0.7)
                                      .z_loss_coeff(0.1)
                                      .seed(5);
      Gate gate(options);
      const at::Tensor rows = own_rows(21);
      DenseInputs inputs;
      inputs.topk_ids = at::stack({at::arange(21), at::arange(21) + 3}, 1).remainder(kExperts);
      inputs.topk_ids[4][0] = inputs.topk_ids[5][1] = -1;
      inputs.topk_ids[6].fill_(-1);
      expect_dense(gate, rows, at::kFloat, 2e-6, inputs);
      inputs.mask = at::arange(21).remainder(4).ne(1);
      inputs.topk_ids[1].fill_(1000);  // masked: not looked at
      expect_dense(gate, rows, at::kFloat, 2e-6, inputs);

      // Its own choice gives the same bits; capacity does not drop what is given.
      const GateOutput own = gate->forward(rows.to(at::kFloat));
      Gate crowded(GateOptions(options).capacity_factor(0.25));
      const GateOutput again = crowded->forward(rows.to(at::kFloat), own.topk_ids);
      EXPECT_TRUE(at::equal(again.topk_ids, own.topk_ids));
      EXPECT_TRUE(at::equal(again.topk_weights, own.topk_weights));
      EXPECT_TRUE(at::equal(again.aux_loss, own.aux_loss));
    }
  }
}

TEST(Gate, NoiseIsForTrainingAndRepeats) {
  constexpr int64_t kMany = 64;
  const auto make = [&](double noise) {
    // All experts, not normalized: differences of the weights' logarithms are those of the logits.
    return logits_gate(
        GateOptions(1, kMany).top_k(kMany).normalize_top_k(false).logit_noise(noise).seed(3).layer(
            0));
  };
  Gate gate = make(0.5), plain = make(0);
  const at::Tensor x = random_rows(50, kMany, 4, world()->rank()).to(at::kFloat);
  const auto log_scores = [](Gate& of, const at::Tensor& rows) {
    const GateOutput out = of->forward(rows);
    return at::zeros_like(rows).scatter(1, out.topk_ids, out.topk_weights.log());
  };
  const at::Tensor first = log_scores(gate, x);
  const at::Tensor raw = first - log_scores(plain, x), noise = raw - raw.mean(1, true);
  EXPECT_NEAR(noise.std().item<double>(), 0.5, 0.03);
  EXPECT_NEAR(noise.mean().item<double>(), 0, 1e-5);
  {
    const at::NoGradGuard no_grad;  // the first run of a recomputation
    EXPECT_TRUE(at::equal(log_scores(gate, x), first));
  }
  Gate again = make(0.5);
  EXPECT_TRUE(at::equal(log_scores(again, x), first));
  // Other tokens, another layer, other noise; tokens of two rows swapped too.
  const auto correlation = [&](Gate& other, const at::Tensor& rows) {
    const at::Tensor theirs = log_scores(other, rows) - log_scores(plain, rows);
    return (noise * theirs).mean().item<double>() / 0.25;
  };
  EXPECT_NEAR(correlation(gate, x + 1), 0, 0.1);
  EXPECT_NEAR(correlation(gate, x.flip(0)), 0, 0.1);
  Gate layer = logits_gate(
      GateOptions(1, kMany).top_k(kMany).normalize_top_k(false).logit_noise(0.5).seed(3).layer(1));
  EXPECT_NEAR(correlation(layer, x), 0, 0.1);
  gate->eval();
  EXPECT_TRUE(at::equal(log_scores(gate, x), log_scores(plain, x)));
}

/// A router of a user's own: one expert by the sign of the first channel, and the next one.
struct SignGate : torch::nn::Module {
  SignGate() { scale = register_parameter("scale", at::ones({1})); }
  GateOutput forward(const at::Tensor& x) {
    EXPECT_FALSE(x.isnan().any().item<bool>());
    GateOutput out;
    const at::Tensor first = x.select(1, 0).gt(0).to(at::kLong);
    out.topk_ids = at::stack({first, first + 1}, 1);
    out.topk_weights = scale.to(at::kFloat) * at::ones({x.size(0), 2}) / 2;
    if (with_loss) out.aux_loss = scale.sum();
    return out;
  }
  at::Tensor scale;
  bool with_loss = true;
};

TEST(Gate, ACustomGateRoutes) {
  const auto module = std::make_shared<SignGate>();
  Gate gate(GateOptions(kHidden, kExperts).layer(0).custom_gate([&] {
    return torch::nn::AnyModule(module);
  }));
  EXPECT_FALSE(gate->weight.defined());
  EXPECT_EQ(gate->named_parameters().keys(), std::vector<std::string>{"custom.scale"});
  at::Tensor x = at::ones({3, kHidden});
  x[1] = -1;
  x[2] = NAN;
  const GateOutput out = gate->forward(x, at::tensor({1, 1, 0}).to(at::kBool));
  EXPECT_TRUE(at::equal(out.topk_ids, at::tensor({1, 2, 0, 1, -1, -1}, at::kLong).view({3, 2})));
  EXPECT_TRUE(at::equal(out.topk_weights, at::tensor({.5F, .5F, .5F, .5F, 0.F, 0.F}).view({3, 2})));
  EXPECT_TRUE(at::equal(out.load, at::tensor({1, 2, 1, 0, 0, 0, 0, 0}, at::kLong)));
  EXPECT_EQ(out.aux_loss.item<double>(), 1);
  EXPECT_EQ(out.z_loss.item<double>(), 0);
  out.topk_weights.sum().backward();
  EXPECT_EQ(module->scale.grad().item<double>(), 2);
  gate->to(at::kBFloat16);  // its dtype is its own matter
  EXPECT_EQ(module->scale.scalar_type(), at::kBFloat16);
  gate->update_expert_bias(*world());

  module->with_loss = false;
  EXPECT_EQ(gate->forward(at::ones({0, kHidden})).aux_loss.item<double>(), 0);
  expect_error("topk_ids are given, but the gate is a custom one", [&] {
    (void)gate->forward(x, RouteInputs().topk_ids(at::zeros({3, 2}, at::kLong)));
  });
  struct Returns : torch::nn::Module {
    GateOutput forward(const at::Tensor& /*x*/) { return out; }
    GateOutput out;
  };
  const auto returns = std::make_shared<Returns>();
  Gate wrong(GateOptions(kHidden, kExperts).layer(0).custom_gate([&] {
    return torch::nn::AnyModule(returns);
  }));
  const auto refused = [&](const std::string& text) {
    expect_error(text, [&] { (void)wrong->forward(at::ones({3, kHidden})); });
  };
  refused("the custom gate returned no topk_ids");
  returns->out.topk_ids = at::zeros({3, 1}, at::kLong);
  refused("the custom gate returned topk_ids of Long [3, 1] (must be Long [3, 2]");
  returns->out.topk_ids = at::tensor({0, 1, 0, 1, 0, 8}, at::kLong).view({3, 2});
  refused("the custom gate returned no topk_weights");
  returns->out.topk_weights = at::ones({3, 2}, at::kDouble);
  refused("the custom gate returned topk_weights of Double [3, 2] (must be Float [3, 2]");
  returns->out.topk_weights = at::ones({3, 2});
  refused("topk_ids hold 0 to 8 (must be 0 to 7, or -1 for none)");
}

TEST(Gate, RouterStaysInFp32UnderAnyTo) {
  Gate gate(
      GateOptions(kHidden, kExperts).layer(0).score_function("sigmoid").expert_bias_rate(1e-4));
  torch::nn::Sequential model(torch::nn::Linear(kHidden, kHidden), gate);
  const at::Tensor weight = gate->weight, before = gate->weight.detach().clone();
  gate->weight.mutable_grad() = at::ones_like(weight);
  const auto expect_fp32 = [&](const char* what) {
    SCOPED_TRACE(what);
    EXPECT_EQ(gate->weight.scalar_type(), at::kFloat);
    EXPECT_EQ(gate->expert_bias.scalar_type(), at::kFloat);
    EXPECT_TRUE(gate->weight.is_same(weight));  // the optimizer's and the reducer's
    EXPECT_TRUE(at::equal(gate->weight, before));
    EXPECT_TRUE(at::equal(gate->weight.grad(), at::ones_like(before)));
  };
  gate->to(at::kBFloat16);
  expect_fp32("gate->to(bfloat16)");
  gate->to(at::kHalf, /*non_blocking=*/true);
  expect_fp32("gate->to(half)");
  gate->to(at::Device(at::kCPU), at::kBFloat16);
  expect_fp32("gate->to(cpu, bfloat16)");
  gate->to(at::Device(at::kCPU));
  expect_fp32("gate->to(cpu)");
  model->to(at::kBFloat16);
  expect_fp32("model->to(bfloat16)");
  EXPECT_EQ(model->parameters()[0].scalar_type(), at::kBFloat16);
  static_cast<torch::nn::Module&>(*model).to(at::Device(at::kCPU), at::kHalf);
  expect_fp32("module.to(cpu, half)");
  model->to(at::kDouble);
  EXPECT_EQ(gate->weight.scalar_type(), at::kDouble);
  model->to(at::kBFloat16);
  expect_fp32("and back");

  // So small steps of the bias add up: bfloat16 would stop at 2^-5.
  gate->expert_bias.fill_(0.03125);
  {
    const at::NoGradGuard no_grad;
    gate->weight.zero_();
  }
  (void)gate->forward(own_rows(8).to(at::kBFloat16));
  gate->update_expert_bias(*world());
  EXPECT_FLOAT_EQ(gate->expert_bias[0].item<float>(), 0.03125F - 1e-4F);
  EXPECT_FLOAT_EQ(gate->expert_bias[7].item<float>(), 0.03125F + 1e-4F);
}

TEST(Gate, RefusesParametersOfOtherSizes) {
  Gate gate(GateOptions(kHidden, kExperts).layer(0).score_function("sigmoid")),
      other(GateOptions(kHidden, 2 * kExperts).score_function("sigmoid"));
  std::stringstream file;
  torch::save(other, file);
  torch::load(gate, file);
  expect_error("gate.weight is [16, 12], but this layer's is [8, 12]",
               [&] { (void)gate->forward(own_rows(3)); });
}

TEST(Gate, CapacityIsThatOfTheNumbersAsWritten) {
  // Everyone wants expert 0, so as many stay as it holds.
  const auto kept = [](int64_t tokens, int64_t experts, int64_t k, double factor) {
    Gate gate(GateOptions(1, experts).top_k(k).capacity_factor(factor).drop_policy("position"));
    set_weight(gate, at::zeros({experts, 1}));
    return gate->forward(at::ones({tokens, 1})).topk_ids.eq(0).sum().item<int64_t>();
  };
  EXPECT_EQ(kept(400, 4, 1, 1.1), 110);
  EXPECT_EQ(kept(1000, 10, 1, 0.07), 7);
  EXPECT_EQ(kept(100, 1, 1, 0.55), 55);
  EXPECT_EQ(kept(400, 4, 1, 1.25), 125);
  EXPECT_EQ(kept(10, 1, 1, 1e-300), 1);
  EXPECT_EQ(kept(10, 1, 1, 1e300), 10);
  EXPECT_EQ(kept(1000, 4, 1, 1.000001), 251);  // 250.00025
  for (const int64_t tokens : {1, 7, 60, 100}) {
    for (const int64_t experts : {3, 7, 10}) {
      for (const int64_t k : {1, 2}) {
        for (int64_t hundredths = 1; hundredths < 500; hundredths += 7) {
          const int64_t above = tokens * k * hundredths, below = experts * 100;
          EXPECT_EQ(kept(tokens, experts, k, static_cast<double>(hundredths) / 100),
                    std::min(tokens, (above + below - 1) / below))
              << tokens << " " << experts << " " << k << " " << hundredths;
        }
      }
    }
  }
}

TEST(Gate, NoTokens) {
  for (const char* score : {"softmax", "sigmoid"}) {
    Gate gate(GateOptions(kHidden, kExperts)
                  .layer(0)
                  .top_k(3)
                  .score_function(score)
                  .aux_loss_coeff(1)
                  .z_loss_coeff(1)
                  .capacity_factor(1));
    const at::Tensor x = at::empty({0, kHidden}).set_requires_grad(true);
    const GateOutput out = gate->forward(x);
    EXPECT_EQ(out.topk_ids.sizes(), (std::vector<int64_t>{0, 3}));
    EXPECT_EQ(out.topk_weights.sizes(), (std::vector<int64_t>{0, 3}));
    EXPECT_TRUE(at::equal(out.load, at::zeros({kExperts}, at::kLong)));
    EXPECT_EQ(out.aux_loss.item<double>(), 0);
    EXPECT_EQ(out.z_loss.item<double>(), 0);
    (out.topk_weights.sum() + out.aux_loss + out.z_loss).backward();
    EXPECT_TRUE(at::equal(gate->weight.grad(), at::zeros_like(gate->weight)));
    EXPECT_EQ(x.grad().sizes(), x.sizes());
  }
}

TEST(Gate, RefusesBadOptions) {
  const auto refused = [](const GateOptions& options, const std::string& text) {
    expect_error(text, [&] { Gate gate(options); });
  };
  refused(GateOptions(0, 4), "hidden_size is 0 (must be at least 1)");
  refused(GateOptions(4, 0), "num_experts is 0 (must be at least 1)");
  refused(GateOptions(4, 4).top_k(0), "top_k is 0 (must be at least 1)");
  refused(GateOptions(4, 4).top_k(5), "top_k 5 > num_experts 4");
  refused(GateOptions(4, 4).score_function("relu"),
          "unknown score_function 'relu': use softmax or sigmoid");
  refused(GateOptions(4, 4).drop_policy("last"),
          "unknown drop_policy 'last': use probs or position");
  refused(GateOptions(4, 4).capacity_factor(-1), "capacity_factor is -1");
  refused(GateOptions(4, 4).capacity_factor(NAN), "capacity_factor is nan");
  refused(GateOptions(4, 4).aux_loss_coeff(-0.1), "aux_loss_coeff is -0.1");
  refused(GateOptions(4, 4).z_loss_coeff(INFINITY), "z_loss_coeff is inf");
  refused(GateOptions(4, 4).expert_bias_rate(0.1), "use score_function sigmoid");
  refused(GateOptions(4, 4).score_function("sigmoid").expert_bias_rate(-1),
          "expert_bias_rate is -1");
  refused(GateOptions(4, 6).num_groups(4), "num_groups is 4 (must be at least 1, and divide");
  refused(GateOptions(4, 4).num_groups(0), "num_groups is 0");
  refused(GateOptions(4, 4).top_k_groups(2), "top_k_groups is 2 (must be 1 to num_groups, 1)");
  refused(GateOptions(4, 4).num_groups(4).top_k_groups(0), "top_k_groups is 0");
  refused(GateOptions(4, 8).top_k(3).num_groups(4).top_k_groups(1),
          "top_k 3 > the 2 experts of top_k_groups 1 groups");
  refused(GateOptions(4, 4).routed_scaling_factor(0), "routed_scaling_factor is 0");
  refused(GateOptions(4, 4).routed_scaling_factor(INFINITY), "routed_scaling_factor is inf");
  refused(GateOptions(4, 4).logit_noise(-1), "logit_noise is -1");
  refused(GateOptions(4, 4).aux_loss_scope("group"),
          "unknown aux_loss_scope 'group': use world, rank or sequence");
  const GateOptions custom =
      GateOptions(4, 4).custom_gate([] { return torch::nn::AnyModule(SignGate()); });
  const auto ignored = [&](const GateOptions& options, const std::string& option) {
    refused(options, option + " is set, but the gate is a custom one");
  };
  ignored(GateOptions(custom).score_function("sigmoid"), "score_function sigmoid");
  ignored(GateOptions(custom).normalize_top_k(true), "normalize_top_k");
  ignored(GateOptions(custom).num_groups(2), "num_groups");
  ignored(GateOptions(custom).routed_scaling_factor(2), "routed_scaling_factor");
  ignored(GateOptions(custom).logit_noise(1), "logit_noise");
  ignored(GateOptions(custom).capacity_factor(1), "capacity_factor");
  ignored(GateOptions(custom).aux_loss_coeff(1), "aux_loss_coeff");
  ignored(GateOptions(custom).z_loss_coeff(1), "z_loss_coeff");
}

TEST(Gate, RefusesBadInputs) {
  Gate gate(GateOptions(4, 4));
  const auto refused = [&](const at::Tensor& x, const RouteInputs& inputs,
                           const std::string& text) {
    expect_error(text, [&] { (void)gate->forward(x, inputs); });
  };
  const at::Tensor x = at::zeros({2, 3, 4});
  refused(at::zeros({2, 5}), {}, "the gate's input is [2, 5] (must be [tokens, 4]");
  refused(at::zeros({4}), {}, "the gate's input is [4]");
  refused(x, at::ones({6}), "the mask's dtype is Float (must be bool");
  refused(x, at::ones({6}, at::kInt), "the mask's dtype is Int");
  refused(x, at::ones({6}, at::kLong), "topk_ids are Long [6] for input [2, 3, 4]");
  refused(x, at::ones({5}, at::kBool), "the mask is [5] for input [2, 3, 4]");
  refused(x, at::ones({3, 2}, at::kBool), "the mask is [3, 2]");
  const auto ids = [&](const at::Tensor& given, const std::string& text) {
    refused(x, RouteInputs().topk_ids(given), text);
  };
  ids(at::zeros({6, 2}), "topk_ids are Float [6, 2]");
  ids(at::zeros({6, 3}, at::kLong), "topk_ids are Long [6, 3] for input [2, 3, 4]");
  ids(at::zeros({5, 2}, at::kLong), "topk_ids are Long [5, 2]");
  ids(at::arange(12).view({6, 2}), "topk_ids hold 0 to 11 (must be 0 to 3, or -1 for none)");
  ids(at::arange(-2, 10).remainder(4).sub(2).view({6, 2}), "topk_ids hold -2 to 1");
  ids(at::zeros({6, 2}, at::kLong), "topk_ids name an expert twice in a token");
  ids(at::full({6, 2}, 4, at::kLong), "topk_ids hold 4 to 4");
}

}  // namespace
}  // namespace lshmoe
