// restore=source: forward and backward against the paper's formulas in double, with the assignment
// of the codec. Clusters are those of one source rank, so each rank can check itself.

#include <gtest/gtest.h>

#include "lshmoe/moe/dispatcher.hpp"
#include "lshmoe/runtime/error.hpp"
#include "tests/support/main.hpp"

namespace lshmoe {
namespace {
using testing::world;

constexpr int64_t kHidden = 8, kExperts = 4, kTopK = 2;

at::Tensor expert(const at::Tensor& x, const at::Tensor& matrices, int64_t e) {
  return at::tanh(at::mm(x, matrices[e].to(x.scalar_type())));
}

/// y by the formulas, in double.
at::Tensor reference(const at::Tensor& x, const at::Tensor& ids, const at::Tensor& weights,
                     const at::Tensor& matrices, const CodecOptions& options, bool codec_on_self) {
  const auto codec = make_codec(options, {kHidden, 0, Direction::dispatch, at::kFloat});
  const at::Tensor exact = x.to(at::kDouble);
  at::Tensor y = at::zeros({x.size(0), kHidden}, at::kDouble) + 0 * (exact.sum() + weights.sum());
  const int64_t local = kExperts / world()->size();
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
    }
    const at::Tensor c = centroids.index_select(0, assignment);
    const at::Tensor out =
        expert(centroids, matrices, e).index_select(0, assignment) + options.alpha() * (rows - c);
    const at::Tensor w = weights.to(at::kDouble).index({token, slot}).unsqueeze(1);
    y = y.index_add(0, token, w * out);
  }
  return y;
}

class SourceTest : public ::testing::TestWithParam<std::tuple<int, double, bool, int>> {};

TEST_P(SourceTest, EqualsFormulas) {
  const auto [tokens_but_of_rank1, alpha, codec_on_self, alignment] = GetParam();
  const int64_t tokens = world()->rank() == 1 ? 0 : tokens_but_of_rank1;
  const CodecOptions options =
      CodecOptions().restore("source").hashes(1).hash_dim(3).projection(4).refine(0).alpha(alpha);
  const ExpertGroups groups = make_expert_groups(world());
  const Dispatcher dispatcher(DispatcherOptions(kHidden, kExperts)
                                  .codec(options)
                                  .codec_on_self(codec_on_self)
                                  .alignment(alignment),
                              groups);
  at::Generator shared = at::make_generator<at::CPUGeneratorImpl>(3);
  at::Generator own =
      at::make_generator<at::CPUGeneratorImpl>(10 + static_cast<uint64_t>(world()->rank()));
  const at::Tensor matrices = at::randn({kExperts, kHidden, kHidden}, shared);
  const at::Tensor x = at::randn({tokens, kHidden}, own).set_requires_grad(true);
  at::Tensor ids = std::get<1>(at::sort(at::rand({tokens, kExperts}, own), 1)).narrow(1, 0, kTopK);
  ids = at::where(at::rand({tokens, kTopK}, own) < 0.1, -1, ids);
  const at::Tensor weights = at::rand({tokens, kTopK}, own).set_requires_grad(true);
  const at::Tensor grad = at::randn({tokens, kHidden}, own);

  const Dispatched d = dispatcher.dispatch(x, ids, weights);
  std::vector<at::Tensor> outputs;
  const auto blocks = d.rows.split_with_sizes(d.rows_per_expert);
  for (std::size_t e = 0; e < blocks.size(); ++e)
    outputs.push_back(
        expert(blocks[e], matrices, dispatcher.first_local_expert() + static_cast<int64_t>(e)));
  const at::Tensor y = dispatcher.combine(at::cat(outputs), d);
  const auto got = torch::autograd::grad({y}, {x, weights}, {grad});

  const at::Tensor expected = reference(x, ids, weights, matrices, options, codec_on_self);
  const auto want = torch::autograd::grad({expected}, {x, weights}, {grad.to(at::kDouble)});
  EXPECT_TRUE(at::allclose(y.to(at::kDouble), expected, 1e-4, 1e-5));
  EXPECT_TRUE(at::allclose(got[0].to(at::kDouble), want[0].to(at::kDouble), 1e-4, 1e-5));
  EXPECT_TRUE(at::allclose(got[1].to(at::kDouble), want[1].to(at::kDouble), 1e-4, 1e-5));
  const bool clustered = (codec_on_self || world()->size() > 1) && tokens > 20;
  const DirectionStats& stats = (*d.stats)[Direction::dispatch];
  EXPECT_EQ(stats.clusters < stats.rows, clustered) << stats.clusters << " of " << stats.rows;
}

INSTANTIATE_TEST_SUITE_P(Cases, SourceTest,
                         ::testing::Values(std::tuple(0, 1.0, false, 1),
                                           std::tuple(64, 1.0, false, 1),
                                           std::tuple(64, 0.0, false, 1),
                                           std::tuple(64, 0.5, true, 1),
                                           std::tuple(64, 1.0, false, 8)));

}  // namespace
}  // namespace lshmoe
