// restore=source: forward and backward against the paper's formulas in double, with the assignment
// of the codec. Clusters are those of one source rank, so each rank can check itself.

#include <gtest/gtest.h>

#include <algorithm>

#include "lshmoe/moe/dispatcher.hpp"
#include "tests/support/main.hpp"

namespace lshmoe {
namespace {
using testing::world;

constexpr int64_t kHidden = 8, kExperts = 4, kTopK = 2;

/// What the formulas say of one rank's tokens, in double; alpha a constant.
struct Reference {
  at::Tensor y;
  at::Tensor alpha;                  ///< [experts]
  double mean_relative_error = 0.0;  ///< mean of |x - c'| / |x| over the coded (token, expert)
  int64_t probes = 0;
};

template <class Expert>
Reference reference(const at::Tensor& x, const at::Tensor& ids, const at::Tensor& weights,
                    const CodecOptions& options, bool codec_on_self, const Expert& expert_of) {
  const auto codec = make_codec(options, {kHidden, 0, Direction::dispatch, at::kFloat});
  const at::Tensor exact = x.to(at::kDouble);
  Reference made;
  made.y = at::zeros({x.size(0), kHidden}, at::kDouble) + 0 * (exact.sum() + weights.sum());
  made.alpha = at::full({kExperts}, options.alpha(), at::kDouble);
  const int64_t local = kExperts / world()->size();
  int64_t coded = 0;
  for (int64_t e = 0; e < kExperts; ++e) {
    const auto hits = ids.eq(e).nonzero();
    const at::Tensor token = hits.select(1, 0), slot = hits.select(1, 1);
    const int64_t count = token.size(0);
    if (count == 0) continue;
    const at::Tensor rows = exact.index_select(0, token);
    at::Tensor assignment = at::arange(count, at::kLong), centroids = rows;
    if (codec_on_self || e / local != world()->rank()) {
      const Encoded encoded = codec->encode(x.detach(), token, {count});
      assignment = encoded.assignment;
      const at::Tensor members = at::bincount(assignment).to(at::kDouble).unsqueeze(1);
      const at::Tensor mean =
          at::zeros({members.size(0), kHidden}, at::kDouble).index_add(0, assignment, rows) /
          members;
      centroids = mean + (encoded.centroids.to(at::kDouble) - mean).detach();
      double above = 0, below = 0;
      for (const Probe& probe : encoded.probes) {
        const at::Tensor c = encoded.centroids[probe.cluster].to(at::kDouble);
        const at::Tensor apart = rows[probe.row].detach() - c;
        const at::Tensor outputs = expert_of(at::stack({rows[probe.row].detach(), c}), e);
        above += (outputs[0] - outputs[1]).dot(apart).item<double>();
        below += apart.dot(apart).item<double>();
      }
      if (!encoded.probes.empty()) made.alpha[e] = above / below;
      made.probes += static_cast<int64_t>(encoded.probes.size());
      const at::Tensor error = (rows - centroids.index_select(0, assignment)).norm(2, 1);
      made.mean_relative_error += (error / rows.norm(2, 1)).sum().item<double>();
      coded += count;
    }
    const at::Tensor c = centroids.index_select(0, assignment);
    const at::Tensor out = expert_of(centroids, e).index_select(0, assignment) +
                           made.alpha[e].item<double>() * (rows - c);
    const at::Tensor w = weights.to(at::kDouble).index({token, slot}).unsqueeze(1);
    made.y = made.y.index_add(0, token, w * out);
  }
  if (coded > 0) made.mean_relative_error /= static_cast<double>(coded);
  return made;
}

/// What a rank routes: some tokens dropped.
struct Routed {
  at::Tensor x, ids, weights;
};
Routed routed(int64_t tokens) {
  at::Generator own =
      at::make_generator<at::CPUGeneratorImpl>(10 + static_cast<uint64_t>(world()->rank()));
  Routed r;
  r.x = at::randn({tokens, kHidden}, own).set_requires_grad(true);
  r.ids = std::get<1>(at::sort(at::rand({tokens, kExperts}, own), 1)).narrow(1, 0, kTopK);
  r.ids = at::where(at::rand({tokens, kTopK}, own) < 0.1, -1, r.ids);
  r.weights = at::rand({tokens, kTopK}, own).set_requires_grad(true);
  return r;
}
CodecOptions source() {
  return CodecOptions().restore("source").hashes(1).hash_dim(3).projection(4).refine(0);
}

struct Outcome {
  at::Tensor y;
  std::shared_ptr<ExchangeStats> stats;
};
template <class Expert>
Outcome run(const DispatcherOptions& options, const Routed& r, const Expert& expert_of) {
  const Dispatcher dispatcher(options, make_expert_groups(world()));
  const Dispatched d = dispatcher.dispatch(r.x, r.ids, r.weights);
  std::vector<at::Tensor> outputs;
  const auto blocks = d.rows.split_with_sizes(d.rows_per_expert);
  for (std::size_t e = 0; e < blocks.size(); ++e)
    outputs.push_back(
        expert_of(blocks[e], dispatcher.first_local_expert() + static_cast<int64_t>(e)));
  return {dispatcher.combine(at::cat(outputs), d), d.stats};
}

struct SourceCase {
  int64_t tokens_but_of_rank1;
  CodecOptions options;
  bool codec_on_self = false;
  int64_t alignment = 1;
};
class SourceTest : public ::testing::TestWithParam<SourceCase> {};

TEST_P(SourceTest, EqualsFormulas) {
  const auto [tokens_but_of_rank1, options, codec_on_self, alignment] = GetParam();
  const Routed r = routed(world()->rank() == 1 ? 0 : tokens_but_of_rank1);
  at::Generator stream = at::make_generator<at::CPUGeneratorImpl>(3);
  const at::Tensor matrices = at::randn({kExperts, kHidden, kHidden}, stream);
  const auto expert = [&](const at::Tensor& x, int64_t e) {
    return at::tanh(at::mm(x, matrices[e].to(x.scalar_type())));
  };
  const at::Tensor grad = at::randn(r.x.sizes(), stream);

  const Outcome got = run(DispatcherOptions(kHidden, kExperts)
                              .layer(0)
                              .codec(options)
                              .codec_on_self(codec_on_self)
                              .alignment(alignment),
                          r, expert);
  const auto got_grads = torch::autograd::grad({got.y}, {r.x, r.weights}, {grad});

  const Reference want = reference(r.x, r.ids, r.weights, options, codec_on_self, expert);
  const auto want_grads = torch::autograd::grad({want.y}, {r.x, r.weights}, {grad.to(at::kDouble)});
  const auto expect_close = [](const at::Tensor& a, const at::Tensor& b) {
    EXPECT_TRUE(at::allclose(a.to(at::kDouble), b.to(at::kDouble), 1e-4, 1e-5));
  };
  expect_close(got.y, want.y);
  expect_close(got_grads[0], want_grads[0]);
  expect_close(got_grads[1], want_grads[1]);
  // Groups of a few tokens may find no two of one bucket.
  const bool few = r.x.size(0) > 0 && r.x.size(0) < 20;
  const bool clustered = (codec_on_self || world()->size() > 1) && r.x.size(0) > 0 && !few;
  const DirectionStats& stats = (*got.stats)[Direction::dispatch];
  if (!few) {
    EXPECT_EQ(stats.clusters < stats.rows, clustered) << stats.clusters << " of " << stats.rows;
  }
  EXPECT_NEAR(stats.mean_relative_error, want.mean_relative_error, 1e-5);
  EXPECT_EQ(want.probes > 0, clustered && options.estimate_alpha());
  if (options.estimate_alpha()) {
    expect_close(at::tensor(at::ArrayRef<double>(got.stats->alpha)), want.alpha);
  } else {
    EXPECT_TRUE(got.stats->alpha.empty());
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cases, SourceTest,
    ::testing::Values(SourceCase{0, source().alpha(1)}, SourceCase{64, source().alpha(1)},
                      SourceCase{64, source()}, SourceCase{64, source().alpha(0.5), true},
                      SourceCase{64, source().alpha(1), false, 8},
                      SourceCase{64, source().alpha(1).refine(2).max_clusters(5), true},
                      SourceCase{64, source().alpha(0.25).estimate_alpha(true)},
                      SourceCase{64, source().estimate_alpha(true).alpha_probes(1), true, 8},
                      SourceCase{64, source().estimate_alpha(true).refine(1).max_clusters(5), true},
                      SourceCase{5, source().alpha(1).estimate_alpha(true), true}));

TEST(Refine, BringsTokensNearerToTheirCentroids) {
  const Routed r = routed(300);
  const auto expert = [](const at::Tensor& x, int64_t) { return x; };
  std::vector<DirectionStats> by_passes;
  for (const int64_t refine : {0, 1, 3}) {
    const Outcome got = run(DispatcherOptions(kHidden, kExperts)
                                .layer(0)
                                .codec(source().projection(kHidden).refine(refine))
                                .codec_on_self(true),
                            r, expert);
    by_passes.push_back((*got.stats)[Direction::dispatch]);
  }
  // From the same seeds: no more clusters, and a smaller error.
  for (std::size_t i = 1; i < by_passes.size(); ++i) {
    EXPECT_LE(by_passes[i].clusters, by_passes[i - 1].clusters);
    EXPECT_LT(by_passes[i].mean_relative_error, 0.99 * by_passes[i - 1].mean_relative_error);
  }
}

TEST(EstimatedAlpha, OfExpertsThatScaleIsTheScale) {
  const Routed r = routed(100);
  const auto expert = [](const at::Tensor& x, int64_t e) {
    return (static_cast<double>(e) - 1.5) * x + 2;
  };
  const Outcome got = run(DispatcherOptions(kHidden, kExperts)
                              .layer(0)
                              .codec(source().alpha(9).estimate_alpha(true))
                              .codec_on_self(true),
                          r, expert);
  at::Tensor exact = at::zeros({100, kHidden}, at::kDouble);
  EXPECT_EQ(got.stats->alpha.size(), static_cast<std::size_t>(kExperts));
  for (int64_t e = 0; e < kExperts; ++e) {
    EXPECT_NEAR(got.stats->alpha.at(static_cast<std::size_t>(e)), static_cast<double>(e) - 1.5,
                1e-5);
    const at::Tensor weight = at::where(r.ids == e, r.weights, 0).sum(1, /*keepdim=*/true);
    exact = exact + weight.detach() * expert(r.x.detach().to(at::kDouble), e);
  }
  EXPECT_TRUE(at::allclose(got.y.to(at::kDouble), exact, 1e-4, 1e-4));
}

// |y - y exact| / |y exact| for alpha 0, 1 and estimated, experts between the identity and a map
// that has nothing of it.
TEST(EstimatedAlpha, IsBetterThanEitherNumber) {
  const Routed r = routed(400);
  at::Generator stream = at::make_generator<at::CPUGeneratorImpl>(4);
  const at::Tensor matrices = 0.3 * at::randn({kExperts, kHidden, kHidden}, stream);
  for (const double identity : {0.0, 0.5, 1.0}) {
    SCOPED_TRACE(identity);
    const auto expert = [&](const at::Tensor& x, int64_t e) {
      return identity * x + at::tanh(at::mm(x, matrices[e]));
    };
    const auto output_of = [&](const CodecOptions& options) {
      return run(DispatcherOptions(kHidden, kExperts).layer(0).codec(options).codec_on_self(true),
                 r, expert)
          .y.detach();
    };
    const at::Tensor exact = output_of(CodecOptions().kind("none"));
    const auto error = [&](const CodecOptions& options) {
      return ((output_of(options) - exact).norm() / exact.norm()).item<double>();
    };
    const double estimated = error(source().estimate_alpha(true)), zero = error(source()),
                 one = error(source().alpha(1));
    EXPECT_LT(estimated, 1.02 * std::min(zero, one)) << zero << " " << one;
    if (identity == 0.5) {
      EXPECT_LT(estimated, 0.95 * std::min(zero, one)) << zero << " " << one;
    }
  }
}

}  // namespace
}  // namespace lshmoe
