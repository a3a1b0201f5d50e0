// The gate against the router formulas, written as a loop over tokens in double.

#include "lshmoe/moe/gate.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/dense_moe.hpp"
#include "tests/support/errors.hpp"
#include "tests/support/main.hpp"

namespace lshmoe {
namespace {
using testing::dense_gate;
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

/// Output and gradients of `gate` are those of the loop.
Routed expect_dense(Gate& gate, const at::Tensor& rows, at::ScalarType dtype, double tolerance) {
  gate->to(dtype == at::kDouble ? at::kDouble : at::kFloat);
  const at::Tensor x = rows.to(dtype).set_requires_grad(true);
  const at::Tensor exact_x = x.detach().to(at::kDouble).set_requires_grad(true);
  const at::Tensor exact_weight =
      gate->weight.detach().to(at::kDouble).clone().set_requires_grad(true);
  Routed r;
  r.got = gate->forward(x);
  r.expected = dense_gate(exact_x, exact_weight, gate->expert_bias, gate->options);
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
  const double input_tolerance = dtype == at::kBFloat16 ? 4e-3 : 5 * tolerance;
  EXPECT_LE(relative_error(got[0], expected[0]), input_tolerance);
  EXPECT_LE(relative_error(got[1], expected[1]), 5 * tolerance);
  return r;
}

class GateTest : public ::testing::TestWithParam<std::tuple<const char*, int, int>> {};

TEST_P(GateTest, EqualsTheFormulas) {
  const auto [score, k, normalize] = GetParam();
  GateOptions options = GateOptions(kHidden, kExperts)
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
                         ::testing::Combine(::testing::Values("softmax"),
                                            ::testing::Values(1, 2, 3, 8),
                                            ::testing::Values(-1, 0, 1)));
INSTANTIATE_TEST_SUITE_P(Sigmoid, GateTest,
                         ::testing::Combine(::testing::Values("sigmoid"),
                                            ::testing::Values(1, 2, 3, 8), ::testing::Values(-1)));

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
  Gate softmax(GateOptions(kHidden, kExperts));
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

TEST(Gate, SurvivesSigmoidsOfZero) {
  Gate gate = logits_gate(GateOptions(1, 4).top_k(2).score_function("sigmoid").aux_loss_coeff(1));
  const at::Tensor logits = at::full({2, 4}, -1e4).set_requires_grad(true);
  const GateOutput out = gate->forward(logits);
  const at::Tensor loss = out.topk_weights.sum() + out.aux_loss;
  EXPECT_TRUE(std::isfinite(loss.item<double>()));
  EXPECT_TRUE(torch::autograd::grad({loss}, {logits})[0].isfinite().all().item<bool>());
}

TEST(Gate, NoTokens) {
  for (const char* score : {"softmax", "sigmoid"}) {
    Gate gate(GateOptions(kHidden, kExperts)
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
  Gate gate(GateOptions(4, 4));
  EXPECT_THROW((void)gate->forward(at::zeros({2, 5})), InvalidArgument);
  EXPECT_THROW((void)gate->forward(at::zeros({2, 2, 4})), InvalidArgument);
}

}  // namespace
}  // namespace lshmoe
