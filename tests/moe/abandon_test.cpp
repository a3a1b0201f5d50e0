// A step that one rank cannot go on with is given up by all ranks of its group in the same call,
// and the next step works.

#include "lshmoe/runtime/abandon.hpp"

#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "lshmoe/comm/agreement.hpp"
#include "lshmoe/moe/layer.hpp"
#include "tests/support/main.hpp"

namespace lshmoe {
namespace {

using testing::world;
using Reason = StepAbandoned::Reason;

constexpr int64_t kHidden = 12, kExperts = 8, kTokens = 21;

struct Outcome {
  at::Tensor output, grad;
  std::string cause;  // of the StepAbandoned that was thrown; empty: none
  Reason reason{};
};

/// Forward and backward. On the last rank something holds NaN or infinity: `spoil` is "x",
/// "expert" (its output), "grad" (the output's), or empty for nothing.
Outcome run(MoELayer& layer, const std::string& spoil) {
  at::Generator stream =
      at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(world()->rank()) + 3);
  const bool mine = world()->rank() == world()->size() - 1;
  const auto spoiled = [&](const at::Tensor& t, const char* what) {
    if (!mine || spoil != what) return t;
    at::Tensor bad = t.clone();
    bad[5][2] = std::numeric_limits<float>::quiet_NaN();
    return bad;
  };
  at::Tensor x = spoiled(at::randn({kTokens, kHidden}, stream), "x").set_requires_grad(true);
  const at::Tensor grad = spoiled(at::randn({kTokens, kHidden}, stream), "grad");
  const at::Tensor healthy = layer->experts->w2.detach().clone();
  if (mine && spoil == "expert") {
    const at::NoGradGuard no_grad;
    layer->experts->w2.fill_(std::numeric_limits<float>::infinity());
  }
  Outcome result;
  try {
    result.output = layer->forward(x).output;
    result.output.backward(grad);
    result.grad = x.grad();
  } catch (const StepAbandoned& error) {
    result.cause = error.cause;
    result.reason = error.reason;
  }
  const at::NoGradGuard no_grad;
  layer->experts->w2.copy_(healthy);
  return result;
}

MoELayer make_layer(const CodecOptions& codec, const ExpertGroups& groups, int64_t overlap = 1) {
  return MoELayer(MoELayerOptions(kHidden, 16, kExperts)
                      .seed(4)
                      .layer(6)
                      .codec(codec)
                      .codec_on_self(true)
                      .overlap_degree(overlap),
                  groups);
}

std::vector<std::pair<CodecOptions, int64_t>> cases() {
  return {{CodecOptions().kind("int8"), 1},
          {CodecOptions().kind("lsh"), 1},
          {CodecOptions().kind("lsh").state("learned"), 1},
          {CodecOptions().kind("fp8"), 3}};
}

TEST(Abandon, RowsThatNoCodecTakesEndTheStepOnAllRanks) {
  const ExpertGroups groups = make_expert_groups(world());
  const std::string last = std::to_string(world()->size() - 1);
  for (const auto& [codec, overlap] : cases()) {
    SCOPED_TRACE(codec.kind() + " " + codec.state() + ", overlap " + std::to_string(overlap));
    MoELayer layer = make_layer(codec, groups, overlap);
    const Outcome before = run(layer, "");
    ASSERT_EQ(before.cause, "");
    for (const auto& [spoil, direction] :
         {std::pair("x", "dispatch"), std::pair("expert", "combine"),
          std::pair("grad", "combine_backward")}) {
      const Outcome bad = run(layer, spoil);
      EXPECT_EQ(bad.reason, Reason::not_finite);
      EXPECT_NE(bad.cause.find(std::string(" of what rank ") + last + " sends in " + direction +
                               " of layer 6 holds NaN or infinity"),
                std::string::npos)
          << bad.cause;
    }
    // Nothing is left of it.
    const Outcome after = run(layer, "");
    EXPECT_EQ(after.cause, "");
    EXPECT_TRUE(after.output.equal(before.output));
    EXPECT_TRUE(after.grad.equal(before.grad));
  }
}

TEST(Abandon, CentroidsToo) {
  const ExpertGroups groups = make_expert_groups(world());
  MoELayer layer = make_layer(CodecOptions().restore("source"), groups);
  const Outcome before = run(layer, "");
  const Outcome bad = run(layer, "x");
  EXPECT_NE(bad.cause.find("row 5 of what rank " + std::to_string(world()->size() - 1) +
                           " sends in dispatch of layer 6"),
            std::string::npos)
      << bad.cause;
  const Outcome after = run(layer, "");
  EXPECT_EQ(after.cause, "");
  EXPECT_TRUE(after.output.equal(before.output));
}

TEST(Abandon, AWishToStopEndsTheStepOnAllRanks) {
  const ExpertGroups groups = make_expert_groups(world());
  for (const char* kind : {"none", "lsh"}) {
    MoELayer layer = make_layer(CodecOptions().kind(kind), groups);
    const Outcome before = run(layer, "");
    if (world()->rank() == 0) request_abandon();
    const Outcome stopped = run(layer, "");
    withdraw_abandon();
    EXPECT_EQ(stopped.reason, Reason::stop);
    EXPECT_EQ(stopped.cause, "rank 0 was asked to stop, before dispatch of layer 6");
    const Outcome after = run(layer, "");
    EXPECT_EQ(after.cause, "");
    EXPECT_TRUE(after.output.equal(before.output));
    EXPECT_TRUE(after.grad.equal(before.grad));
  }
}

// The other groups learn of it before the world's load is summed up.
TEST(Abandon, SeveralGroupsWithTheAuxLossOfTheWorld) {
  const int ranks = world()->size();
  for (int ep = 1; ep <= ranks; ep *= 2) {
    SCOPED_TRACE("ep_size " + std::to_string(ep));
    MoELayer layer(MoELayerOptions(kHidden, 16, kExperts)
                       .seed(4)
                       .layer(6)
                       .codec(CodecOptions().kind("fp8"))
                       .codec_on_self(true)
                       .aux_loss_coeff(0.1),
                   make_expert_groups(world(), ep));
    at::Generator stream = at::make_generator<at::CPUGeneratorImpl>(uint64_t{5});
    const at::Tensor x = at::randn({kTokens, kHidden}, stream).set_requires_grad(true);
    // Two micro-batches; the gradient of one is spoiled on the last rank.
    const auto step = [&](int spoiled) -> std::string {
      try {
        run_together(*world(), [&] {
          for (int part = 0; part < 2; ++part) {
            const MoEOutput out = layer->forward(x);
            at::Tensor grad = at::ones_like(x);
            if (part == spoiled && world()->rank() == ranks - 1)
              grad[3][1] = std::numeric_limits<float>::quiet_NaN();
            out.output.backward(grad);
          }
        });
        return "";
      } catch (const StepAbandoned& error) {
        EXPECT_TRUE(error.agreed);
        return error.cause;
      }
    };
    EXPECT_EQ(step(-1), "");
    for (const int spoiled : {0, 1}) {
      EXPECT_NE(step(spoiled).find("sends in combine_backward of layer 6 holds NaN or infinity"),
                std::string::npos);
    }
    EXPECT_EQ(step(-1), "");
  }
}

}  // namespace
}  // namespace lshmoe
