// The Dispatcher against a dense loop: experts that are one matrix each, known to every rank.

#include "lshmoe/moe/dispatcher.hpp"

#include <gtest/gtest.h>

#include <array>
#include <limits>

#include "tests/support/errors.hpp"
#include "tests/support/main.hpp"

namespace lshmoe {
namespace {
using testing::expect_error;
using testing::world;

static_assert(!std::is_copy_constructible_v<Dispatcher>);  // a copy would be the same object

constexpr int64_t kHidden = 6, kExperts = 8, kTopK = 3;

struct Case {
  at::Tensor x, ids, weights, matrices, grad;
};

/// Different on each rank but for the matrices [experts, hidden, hidden].
Case make_case(int64_t tokens, uint64_t seed) {
  at::Generator shared = at::make_generator<at::CPUGeneratorImpl>(seed);
  at::Generator own = at::make_generator<at::CPUGeneratorImpl>(
      seed * 100 + 1 + static_cast<uint64_t>(world()->rank()));
  const auto f64 = at::TensorOptions(at::kDouble);
  Case c;
  c.matrices = at::randn({kExperts, kHidden, kHidden}, shared, f64);
  c.x = at::randn({tokens, kHidden}, own, f64).set_requires_grad(true);
  c.ids = std::get<1>(at::sort(at::rand({tokens, kExperts}, own, f64), 1)).narrow(1, 0, kTopK);
  c.ids = at::where(at::rand({tokens, kTopK}, own, f64) < 0.2, -1, c.ids);
  c.weights = at::rand({tokens, kTopK}, own, f64).set_requires_grad(true);
  c.grad = at::randn({tokens, kHidden}, own, f64);
  return c;
}

at::Tensor dense(const Case& c) {
  at::Tensor y = at::zeros_like(c.x);
  for (int64_t e = 0; e < kExperts; ++e) {
    const at::Tensor w = (c.weights * c.ids.eq(e)).sum(1, true);
    y = y + w * at::tanh(at::mm(c.x, c.matrices[e]));
  }
  return y;
}

at::Tensor through(const Dispatcher& dispatcher, const Case& c, Dispatched* out = nullptr) {
  const Dispatched d = dispatcher.dispatch(c.x, c.ids, c.weights);
  std::vector<at::Tensor> outputs;
  const auto blocks = d.rows.split_with_sizes(d.rows_per_expert);
  for (std::size_t e = 0; e < blocks.size(); ++e)
    outputs.push_back(at::tanh(
        at::mm(blocks[e], c.matrices[dispatcher.first_local_expert() + static_cast<int64_t>(e)])));
  if (out) *out = d;
  return dispatcher.combine(at::cat(outputs), d);
}

std::vector<at::Tensor> gradients(const at::Tensor& y, const Case& c) {
  return torch::autograd::grad({y}, {c.x, c.weights}, {c.grad}, /*retain_graph=*/true);
}

class DispatcherTest : public ::testing::TestWithParam<std::tuple<int, bool, int>> {};

TEST_P(DispatcherTest, EqualsDenseLoop) {
  const auto [tokens_of_rank0, codec_on_self, alignment] = GetParam();
  const ExpertGroups groups = make_expert_groups(world());
  const Dispatcher dispatcher(
      DispatcherOptions(kHidden, kExperts).codec_on_self(codec_on_self).alignment(alignment),
      groups);
  const Case c = make_case(tokens_of_rank0 * (world()->rank() + 1) % 40, 5);
  Dispatched d;
  const Traffic before = groups.expert->traffic();
  const at::Tensor y = through(dispatcher, c, &d), expected = dense(c);
  EXPECT_TRUE(at::allclose(y, expected, 1e-12, 1e-12));
  const auto got = gradients(y, c), want = gradients(expected, c);
  EXPECT_TRUE(at::allclose(got[0], want[0], 1e-12, 1e-12));
  EXPECT_TRUE(at::allclose(got[1], want[1], 1e-12, 1e-12));
  // All four directions are accounted for.
  int64_t raw[4], sent = 0, plan = 0;
  for (int i = 0; i < 4; ++i) {
    raw[i] = d.stats->direction[i].bytes_raw;
    sent += d.stats->direction[i].codec_bytes;
    plan += d.stats->direction[i].plan_bytes;
  }
  const Traffic after = groups.expert->traffic();
  EXPECT_EQ(static_cast<int64_t>(after.bytes_sent - before.bytes_sent), sent + plan);
  EXPECT_EQ(after.calls - before.calls, world()->size() == 1 ? 0U : 8U);
  EXPECT_EQ(raw[0], raw[2]);
  EXPECT_EQ(raw[1], raw[3]);
  EXPECT_EQ(sent > 0, raw[0] + raw[1] > 0);
}

INSTANTIATE_TEST_SUITE_P(Cases, DispatcherTest,
                         ::testing::Values(std::tuple(0, false, 1), std::tuple(1, false, 1),
                                           std::tuple(13, false, 1), std::tuple(13, true, 1),
                                           std::tuple(13, false, 4), std::tuple(40, false, 1)));

TEST(Dispatcher, RowsStandByExpertThenRankThenToken) {
  const ExpertGroups groups = make_expert_groups(world());
  const Dispatcher dispatcher(DispatcherOptions(1, 4), groups);
  // Of every rank the experts get 2, 3, 1 and 4 tokens.
  const at::Tensor ids = at::tensor({3, 1, 0, 3, 1, 2, 3, 0, 1, 3}, at::kLong).view({10, 1});
  const std::vector<std::vector<int64_t>> tokens = {{2, 7}, {1, 4, 8}, {5}, {0, 3, 6, 9}};
  const at::Tensor x = (at::arange(10) + 100 * world()->rank()).to(at::kFloat).view({10, 1});
  const Dispatched d = dispatcher.dispatch(x, ids, x / 8);
  std::vector<int64_t> counts;
  std::vector<float> rows;
  for (int64_t e = 0; e < dispatcher.num_local_experts(); ++e) {
    const auto& of_expert = tokens[static_cast<std::size_t>(dispatcher.first_local_expert() + e)];
    counts.push_back(static_cast<int64_t>(of_expert.size()) * world()->size());
    for (int r = 0; r < world()->size(); ++r)
      for (const int64_t t : of_expert) rows.push_back(static_cast<float>(100 * r + t));
  }
  EXPECT_EQ(d.tokens_per_expert, counts);
  EXPECT_TRUE(at::equal(d.rows.view(-1), at::tensor(rows))) << d.rows;
  EXPECT_TRUE(at::equal(d.row_weights, at::tensor(rows) / 8)) << d.row_weights;
}

TEST(Dispatcher, WeightsThatSumToOneGiveTheIdentity) {
  // Experts that change nothing, weights 1/k; values that leave room for exact quarters.
  const ExpertGroups groups = make_expert_groups(world());
  const Dispatcher dispatcher(DispatcherOptions(kHidden, kExperts), groups);
  const int64_t tokens = std::array{33, 0, 1, 7}[static_cast<std::size_t>(world()->rank())];
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    for (const int64_t k : {1, 2, 3, 4}) {
      if (dtype == at::kBFloat16 && k > 2) continue;  // three quarters need more digits
      SCOPED_TRACE(::testing::Message() << dtype << ", top " << k);
      const Case c = make_case(tokens, 13);
      const at::Tensor x = c.x.detach().to(at::kBFloat16).to(dtype).set_requires_grad(true);
      const at::Tensor grad = c.grad.to(at::kBFloat16).to(dtype);
      const at::Tensor ids = (at::arange(tokens).unsqueeze(1) + at::arange(k) * 3) % kExperts;
      const Dispatched d =
          dispatcher.dispatch(x, ids,
                              at::full({tokens, k}, 1.0 / static_cast<double>(k),
                                       dtype == at::kDouble ? at::kDouble : at::kFloat));
      const at::Tensor y = dispatcher.combine(d.rows, d);
      const at::Tensor got = torch::autograd::grad({y}, {x}, {grad})[0];
      if (k == 3) {
        EXPECT_TRUE(at::allclose(y, x, 1e-6, 1e-6));
        EXPECT_TRUE(at::allclose(got, grad, 1e-6, 1e-6));
      } else {
        EXPECT_TRUE(at::equal(y, x));
        EXPECT_TRUE(at::equal(got, grad));
      }
    }
  }
}

TEST(Dispatcher, DroppedChoicesHaveNoPart) {
  const ExpertGroups groups = make_expert_groups(world());
  for (const char* restore : {"expert", "source"}) {
    SCOPED_TRACE(restore);
    const Dispatcher dispatcher(DispatcherOptions(kHidden, kExperts)
                                    .codec(CodecOptions().restore(restore).max_error(0).alpha(1)),
                                groups);
    // Token 0 keeps both choices, token 1 its second, token 2 none; a dropped weight is not read.
    const at::Tensor ids = at::tensor({0, 7, -1, 5, -1, -1}, at::kLong).view({3, 2});
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const at::Tensor w =
        at::tensor({0.5F, 0.25F, nan, 2.F, nan, nan}).view({3, 2}).set_requires_grad(true);
    const at::Tensor x = at::ones({3, kHidden}).set_requires_grad(true);
    const Dispatched d = dispatcher.dispatch(x, ids, w);
    const at::Tensor y = dispatcher.combine(d.rows * 3, d);
    EXPECT_TRUE(at::allclose(y.select(1, 0), at::tensor({2.25F, 6.F, 0.F}))) << y;
    EXPECT_TRUE(at::equal(y[2], at::zeros({kHidden})));
    const auto gradients = torch::autograd::grad({y.sum()}, {x, w});
    EXPECT_TRUE(at::allclose(gradients[0].select(1, 0), at::tensor({2.25F, 6.F, 0.F})))
        << gradients[0];
    EXPECT_TRUE(at::allclose(
        gradients[1], 3.0 * kHidden * at::tensor({1.F, 1.F, 0.F, 1.F, 0.F, 0.F}).view({3, 2})))
        << gradients[1];
  }
}

TEST(Dispatcher, TwoForwardsThenTwoBackwards) {
  const ExpertGroups groups = make_expert_groups(world());
  const Dispatcher dispatcher(DispatcherOptions(kHidden, kExperts), groups);
  const Case a = make_case(9, 1), b = make_case(5, 2);
  const at::Tensor ya = through(dispatcher, a), yb = through(dispatcher, b);
  const auto got_b = gradients(yb, b), got_a = gradients(ya, a);
  EXPECT_TRUE(at::allclose(got_a[0], gradients(dense(a), a)[0]));
  EXPECT_TRUE(at::allclose(got_b[1], gradients(dense(b), b)[1]));
}

TEST(Dispatcher, ReturnsToRanksWhoseExpertsAreUnused) {
  // All tokens choose expert 0, and the outputs of the experts take no part in the graph.
  const ExpertGroups groups = make_expert_groups(world());
  const Dispatcher dispatcher(DispatcherOptions(kHidden, kExperts), groups);
  const at::Tensor x = at::ones({4, kHidden}).set_requires_grad(true),
                   w = at::ones({4, 1}).set_requires_grad(true);
  const Dispatched d = dispatcher.dispatch(x, at::zeros({4, 1}, at::kLong), w);
  const at::Tensor y = dispatcher.combine(at::full_like(d.rows.detach(), 2.0), d);
  y.sum().backward();
  EXPECT_TRUE(at::equal(y, at::full_like(y, 2.0)));
  EXPECT_TRUE(at::equal(w.grad(), at::full_like(w, 2.0 * kHidden)));
  EXPECT_TRUE(at::equal(x.grad(), at::zeros_like(x)));
}

/// The lowest rank but this one.
std::string first_peer() { return world()->rank() == 0 ? "rank 1" : "rank 0"; }

// Two forwards of equal sizes, whose ways back differ on one rank: combines, or backwards.
TEST(Dispatcher, NamesThePeerThatGoesBackInAnotherOrder) {
  if (world()->size() == 1) GTEST_SKIP() << "needs peers";
  const Case c = make_case(4, 7);
  const at::Tensor ids = at::arange(4).view({4, 1}), weights = c.weights.narrow(1, 0, 1);
  const bool first = world()->rank() == 0;
  const std::string text = first_peer() + " disagrees about the number of the layer's forward of " +
                           "an exchange (" + (first ? "2 there, 1 here" : "1 there, 2 here");
  for (const char* restore : {"expert", "source"}) {
    SCOPED_TRACE(restore);
    const auto dispatched = [&](const Dispatcher& dispatcher) {
      return dispatcher.dispatch(c.x.to(at::kFloat), ids, weights.to(at::kFloat));
    };
    const DispatcherOptions options =
        DispatcherOptions(kHidden, kExperts).codec(CodecOptions().restore(restore));
    {
      const Dispatcher dispatcher(options, make_expert_groups(world()));
      const Dispatched a = dispatched(dispatcher), b = dispatched(dispatcher);
      expect_error<CommError>(
          text, [&] { (void)dispatcher.combine((first ? a : b).rows, first ? a : b); });
    }
    const Dispatcher dispatcher(options, make_expert_groups(world()));
    const auto output = [&] {
      const Dispatched d = dispatched(dispatcher);
      return dispatcher.combine(d.rows, d).sum();
    };
    const at::Tensor a = output(), b = output();
    expect_error<CommError>(text, [&] { (first ? a : b).backward(); });
  }
}

TEST(Dispatcher, NamesThePeerThatDisagrees) {
  if (world()->size() == 1) GTEST_SKIP() << "needs peers";
  const ExpertGroups groups = make_expert_groups(world());
  const Dispatcher dispatcher(DispatcherOptions(kHidden, kExperts).layer(world()->rank()), groups);
  const Case c = make_case(3, 7);
  expect_error<CommError>(first_peer() + " disagrees about the layer of an exchange",
                          [&] { (void)dispatcher.dispatch(c.x, c.ids, c.weights); });
}

TEST(Dispatcher, NamesThePeerWithoutBackward) {
  if (world()->size() == 1) GTEST_SKIP() << "needs peers";
  const ExpertGroups groups = make_expert_groups(world());
  const Dispatcher dispatcher(DispatcherOptions(kHidden, kExperts), groups);
  const Case c = make_case(3, 7);
  const bool frozen = world()->rank() == 0;
  expect_error<CommError>(first_peer() + " disagrees about the gradient", [&] {
    (void)dispatcher.dispatch(frozen ? c.x.detach() : c.x, c.ids,
                              frozen ? c.weights.detach() : c.weights);
  });
}

TEST(Dispatcher, LshWithoutErrorIsBitExact) {
  const ExpertGroups groups = make_expert_groups(world());
  const Case c = make_case(33, 11);
  const at::Tensor x = c.x.detach().to(at::kFloat), w = c.weights.detach().to(at::kFloat);
  std::vector<at::Tensor> results;
  for (const char* kind : {"none", "lsh"}) {
    const Dispatcher dispatcher(
        DispatcherOptions(kHidden, kExperts).codec(CodecOptions().kind(kind).max_error(0)), groups);
    const at::Tensor leaf = x.clone().set_requires_grad(true);
    const Dispatched d = dispatcher.dispatch(leaf, c.ids, w);
    const at::Tensor y = dispatcher.combine(at::tanh(d.rows), d);
    y.backward(c.grad.to(at::kFloat));
    results.push_back(at::cat({y.detach(), leaf.grad()}));
  }
  EXPECT_TRUE(at::equal(results[0], results[1]));
}

TEST(Dispatcher, CountsAreSummedOverTheGroup) {
  const ExpertGroups groups = make_expert_groups(world());
  const int64_t ranks = world()->size(), rank = world()->rank();
  for (const char* restore : {"expert", "source"}) {
    SCOPED_TRACE(restore);
    const Dispatcher dispatcher(
        DispatcherOptions(kHidden, kExperts).codec(CodecOptions().restore(restore)), groups);
    const auto dispatched = [&](const at::Tensor& counts) {
      return dispatcher.dispatch(at::ones({2, kHidden}), at::tensor({0, 7}, at::kLong).view({2, 1}),
                                 at::ones({2, 1}), counts);
    };
    EXPECT_FALSE(dispatched({}).counts.defined());
    const std::uint64_t calls = groups.expert->traffic().calls;
    const int64_t most = (int64_t{1} << 31) - 1;
    const Dispatched d = dispatched(at::tensor({rank, 10 + rank, most}, at::kLong));
    const int64_t sum = ranks * (ranks - 1) / 2;
    EXPECT_TRUE(at::equal(d.counts, at::tensor({sum, 10 * ranks + sum, ranks * most}, at::kLong)))
        << d.counts;
    EXPECT_EQ(groups.expert->traffic().calls - calls, ranks > 1 ? 2U : 0U);  // sizes and rows
    expect_error("counts is Int [1] (must be int64 [n])",
                 [&] { (void)dispatched(at::zeros({1}, at::kInt)); });
    expect_error("counts holds -1 (must be 0 to 2^31 - 1)",
                 [&] { (void)dispatched(at::full({1}, -1, at::kLong)); });
    expect_error("counts holds 2147483648",
                 [&] { (void)dispatched(at::full({1}, most + 1, at::kLong)); });
  }
}

TEST(Dispatcher, RefusesBadInput) {
  const ExpertGroups groups = make_expert_groups(world());
  const at::Tensor x = at::zeros({2, kHidden}), ids = at::zeros({2, 1}, at::kLong),
                   w = at::ones({2, 1});
  for (const char* restore : {"expert", "source"}) {
    SCOPED_TRACE(restore);
    const Dispatcher d(DispatcherOptions(kHidden, kExperts).codec(CodecOptions().restore(restore)),
                       groups);
    const auto refused = [&](const std::string& text, const at::Tensor& rows, const at::Tensor& i,
                             const at::Tensor& weights) {
      expect_error(text, [&] { (void)d.dispatch(rows, i, weights); });
    };
    refused("x is [2, 3] (must be [tokens, 6])", x.narrow(1, 0, 3), ids, w);
    refused("topk_ids is Int [2, 1]", x, ids.to(at::kInt), w);
    refused("topk_ids is Long [1, 1]", x, ids.narrow(0, 0, 1), w.narrow(0, 0, 1));
    refused("topk_ids[0][0] is 8 (experts are 0 .. 7, -1 = dropped)", x, ids + kExperts, w);
    refused("topk_ids[0][0] is -2 (experts are 0 .. 7, -1 = dropped)", x, ids - 2, w);
    refused("topk_ids[0] names expert 0 twice", x, at::zeros({2, 2}, at::kLong), at::ones({2, 2}));
    refused("topk_weights is Double [2, 1]", x, ids, w.to(at::kDouble));
    refused("rows of dtype Half", x.to(at::kHalf), ids, w);
    expect_error("combine needs what dispatch of", [&] { (void)d.combine(x, Dispatched{}); });
    const Dispatched good =
        d.dispatch(x, at::full({2, 1}, world()->rank() * kExperts / world()->size()), w);
    expect_error("expert_output is [2, 5] (must be [2, 6]", [&] {
      (void)d.combine(at::zeros({2, 5}), good);
    });
  }
}

TEST(DispatcherOptions, AreChecked) {
  const auto refused = [](const std::string& text, const DispatcherOptions& o) {
    expect_error(text, [&] { validate(o, 2); });
  };
  EXPECT_NO_THROW(validate(DispatcherOptions(8, 4), 2));
  refused("hidden_size is 0 (must be 1 to 2^24)", DispatcherOptions(0, 4));
  refused("num_experts is 0 (must be 1 to 2^24)", DispatcherOptions(8, 0));
  refused("num_experts 3 is not divisible by ep_size 2", DispatcherOptions(8, 3));
  refused("alignment is 0 (must be 1 to 2^20)", DispatcherOptions(8, 4).alignment(0));
  refused("layer is -1", DispatcherOptions(8, 4).layer(-1));
  refused("'zip'", DispatcherOptions(8, 4).codec(CodecOptions().kind("zip")));
  refused("restore=source is set for combine_backward",
          DispatcherOptions(8, 4).codec_backward(CodecOptions().restore("source")));
  const auto source = DispatcherOptions(8, 4).codec(CodecOptions().restore("source"));
  EXPECT_EQ(source.codec(Direction::dispatch).kind(), "lsh");
  EXPECT_EQ(source.codec(Direction::combine).kind(), "none");
}

}  // namespace
}  // namespace lshmoe
