// The layer on a GPU against the layer on the CPU. Skipped without a GPU; ranks share one where
// there are too few, and nccl is tested where each has its own.

#include <gtest/gtest.h>

#include "lshmoe/comm/nccl/communicator.hpp"
#include "lshmoe/moe/device_rows.hpp"
#include "lshmoe/moe/gradients.hpp"
#include "lshmoe/runtime/error.hpp"
#include "tests/support/layer_runs.hpp"
#include "tests/support/main.hpp"

namespace lshmoe {
namespace {

using testing::expect_runs_equal;
using testing::input_of_rank;
using testing::LayerRun;
using testing::make_layer;
using testing::RankInput;
using testing::session;
using testing::world;

constexpr int64_t kHidden = 64, kExperts = 8;

MoELayerOptions small() { return MoELayerOptions(kHidden, 96, kExperts).top_k(2).seed(3).layer(0); }

class CudaLayer : public ::testing::Test {
 protected:
  void SetUp() override {
    const DeviceChoice own = session().choose_device();
    const DeviceChoice choice = session().choose_device(/*share_gpu=*/true);
    if (choice.index < 0) GTEST_SKIP() << choice.problem;
    device_ = at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(choice.index));
    worlds_ = {world()};
    if (own.index >= 0 && nccl_configured()) worlds_.push_back(make_nccl_communicator(world()));
  }

  LayerRun run_on_gpu(const MoELayerOptions& options, const ExpertGroups& groups,
                      at::ScalarType dtype, const RankInput& input) const {
    const c10::DeviceGuard guard(device_);
    MoELayer layer = make_layer(options, groups, dtype);
    layer->to(device_);
    LayerRun run =
        testing::run_layer(layer, input.rows.to(device_), dtype, input.direction.to(device_));
    EXPECT_EQ(run.output.device(), device_);
    run.output = run.output.cpu();
    for (auto& [name, gradient] : run.gradients)
      if (gradient.defined()) gradient = gradient.cpu();
    return run;
  }

  at::Device device_{at::kCPU};
  std::vector<std::shared_ptr<Communicator>> worlds_;  // staged, and nccl
};

TEST_F(CudaLayer, AsOnTheCpu) {
  struct Case {
    const char* name;
    int64_t tokens;
    MoELayerOptions options;
    double slack = 1;  // of what comes back from a lossy codec; times the dtype's own
  };
  const auto codec = [](const char* kind) { return CodecOptions().kind(kind); };
  // Rows near a border of a codec's steps may fall on its other side: their errors count in full.
  const Case cases[] = {
      {"gelu", 75, small().aux_loss_coeff(0.1).z_loss_coeff(0.1)},
      {"swiglu, shared", 31 + world()->rank(), small().activation("swiglu").shared_expert_size(24)},
      {"relu, capacity", 64, small().activation("relu").capacity_factor(0.75)},
      {"sigmoid, top-3", 40, small().score_function("sigmoid").top_k(3)},
      {"no tokens on rank 0", world()->rank() == 0 ? 0 : 33, small()},
      {"no tokens", 0, small()},
      {"odd sizes", 50, MoELayerOptions(50, 70, kExperts).seed(5).layer(0)},
      {"loop", 75, small().grouped_gemm("loop")},
      {"none", 75, small().codec(codec("none")).codec_on_self(true)},
      {"lossless lsh", 75, small().codec(codec("lsh").max_error(0)).codec_on_self(true)},
      {"bf16", 75, small().codec(codec("bf16")).codec_on_self(true), 2e3},
      {"fp8", 75, small().codec(codec("fp8")).codec_on_self(true), 2e4},
      {"int8", 75, small().codec(codec("int8")).codec_on_self(true), 5e3},
      {"int4", 75, small().codec(codec("int4")).codec_on_self(true), 6e4},
      {"lsh", 75, small().codec(codec("lsh").max_error(0.05)).codec_on_self(true), 5e4},
      {"source", 75, small().codec(codec("lsh").restore("source").alpha(0.5)).codec_on_self(true),
       5e4},
  };
  for (const auto& comm : worlds_) {
    const ExpertGroups groups = make_expert_groups(comm);
    for (const Case& c : cases) {
      const RankInput input = input_of_rank(world()->rank(), c.tokens, c.options.hidden_size());
      for (const at::ScalarType dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
        const std::string& kind = c.options.codec(Direction::dispatch).kind();
        if (dtype == at::kDouble && kind != "none") continue;
        for (const int64_t degree : {1, 2}) {
          const MoELayerOptions options = MoELayerOptions(c.options).overlap_degree(degree);
          if (degree > 1 && sends_centroids(c.options.codec(Direction::dispatch))) continue;
          SCOPED_TRACE(::testing::Message() << comm->backend() << ", " << c.name << ", " << dtype
                                            << ", degree " << degree);
          MoELayer on_cpu = make_layer(options, groups, dtype);
          const LayerRun expected = testing::run_layer(on_cpu, input.rows, dtype, input.direction);
          const LayerRun got = run_on_gpu(options, groups, dtype, input);
          // Sums in another order; bf16 has 8 bits, and every product of it is rounded.
          const double own = dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 1e-5 : 3e-2;
          expect_runs_equal(
              got, expected,
              dtype == at::kFloat ? own * c.slack : own * std::max(1.0, c.slack / 2e3));
          EXPECT_EQ(got.stats.tokens_per_expert, expected.stats.tokens_per_expert);
          EXPECT_TRUE(at::equal(got.stats.load.cpu(), expected.stats.load));
          for (const Direction d : {Direction::dispatch, Direction::combine,
                                    Direction::combine_backward, Direction::dispatch_backward}) {
            const DirectionStats &g = (*got.stats.exchange)[d], &e = (*expected.stats.exchange)[d];
            EXPECT_EQ(g.bytes_raw, e.bytes_raw);
            EXPECT_EQ(g.plan_bytes, e.plan_bytes);
            EXPECT_LE(g.max_error_ratio, 1.0);
          }
        }
      }
    }
  }
}

TEST_F(CudaLayer, EqualBitsInEveryRunAndForEveryDegree) {
  for (const auto& comm : worlds_) {
    const ExpertGroups groups = make_expert_groups(comm);
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      const RankInput input = input_of_rank(world()->rank(), 150, kHidden);
      const LayerRun one = run_on_gpu(small(), groups, dtype, input);
      for (const int64_t degree : {1, 2, 4}) {
        SCOPED_TRACE(::testing::Message() << comm->backend() << ", " << dtype << ", " << degree);
        // fp32 goes through cuBLAS, which may choose another kernel for fewer rows.
        const bool bits = degree == 1 || dtype == at::kBFloat16;
        expect_runs_equal(
            run_on_gpu(MoELayerOptions(small()).overlap_degree(degree), groups, dtype, input), one,
            bits ? 0 : 1e-5);
      }
    }
  }
}

// A step with learned codecs and reduced gradients, ranks in pairs where there are pairs.
TEST_F(CudaLayer, LearnedStateAndGradientReduction) {
  const c10::DeviceGuard guard(device_);
  const int ep_size = world()->size() % 2 == 0 ? 2 : 1;
  for (const auto& comm : worlds_) {
    const ExpertGroups groups = make_expert_groups(comm, ep_size);
    const MoELayerOptions options =
        small().codec(CodecOptions().state("learned").max_error(0.05)).codec_on_self(true);
    const RankInput input = input_of_rank(world()->rank(), 150, kHidden);
    const auto step = [&](at::Device device) {
      MoELayer layer = make_layer(options, groups);
      layer->to(device);
      GradientReducer reducer(groups, *layer);
      std::vector<double> norms;
      for (int i = 0; i < 3; ++i) {
        (void)testing::run_layer(layer, input.rows.to(device), at::kFloat,
                                 input.direction.to(device));
        reducer.reduce();
        norms.push_back(reducer.clip_grad_norm(1.0));
        layer->refresh_codecs();
        EXPECT_EQ(layer->dispatcher().state_stats(Direction::dispatch).version, i == 2 ? 2 : i + 1);
      }
      return norms;
    };
    const std::vector<double> got = step(device_), expected = step(at::kCPU);
    for (std::size_t i = 0; i < got.size(); ++i)
      EXPECT_NEAR(got[i], expected[i], 0.05 * expected[i]) << comm->backend() << ", step " << i;
    EXPECT_EQ(step(device_), got);
  }
}

TEST_F(CudaLayer, RowsAndCopies) {
  const at::Tensor numbers = at::arange(7, at::kLong), none = at::empty({0}, at::kLong);
  const auto there = to_device({numbers, none, numbers + 5}, device_);
  EXPECT_TRUE(at::equal(there[0].cpu(), numbers));
  EXPECT_EQ(there[1].numel(), 0);
  EXPECT_TRUE(at::equal(there[2].cpu(), numbers + 5));
  const at::Tensor bytes = at::arange(3, at::kByte).to(device_);
  const auto here = to_host({bytes, there[2], numbers, (there[0].to(at::kFloat) / 2).view({7, 1})});
  EXPECT_TRUE(at::equal(here[0], at::arange(3, at::kByte)));
  EXPECT_TRUE(at::equal(here[1], numbers + 5));
  EXPECT_TRUE(at::equal(here[2], numbers));
  EXPECT_TRUE(at::equal(here[3], (numbers.to(at::kFloat) / 2).view({7, 1})));
  at::Tensor rows = at::arange(12, at::dtype(at::kFloat).device(device_)).view({4, 3});
  copy_rows(rows, at::tensor({3, 2}, at::kLong), rows, at::tensor({0, 1}, at::kLong));
  EXPECT_TRUE(at::equal(rows.cpu().slice(0, 2),
                        at::tensor({3., 4., 5., 0., 1., 2.}, at::kFloat).view({2, 3})));
}

// What needs no GPU of the above: the same functions on the CPU.
TEST(RowsOnTheCpu, Copies) {
  const at::Tensor numbers = at::arange(7, at::kLong);
  EXPECT_TRUE(to_device({numbers}, at::kCPU)[0].is_same(numbers));
  EXPECT_TRUE(at::equal(to_host({numbers.view({7, 1}).t()})[0], numbers.view({1, 7})));
  at::Tensor rows = at::arange(12, at::kFloat).view({4, 3});
  copy_rows(rows, at::tensor({3, 2}, at::kLong), rows, at::tensor({0, 1}, at::kLong));
  EXPECT_TRUE(
      at::equal(rows.slice(0, 2), at::tensor({3., 4., 5., 0., 1., 2.}, at::kFloat).view({2, 3})));
  EXPECT_THROW((void)row_type(at::kHalf), InvalidArgument);
}

}  // namespace
}  // namespace lshmoe
