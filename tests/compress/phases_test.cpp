// Phases: their names, whose time it is, and that all of encode and decode is in them.

#include "lshmoe/compress/phases.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <set>
#include <string>
#include <thread>

#include "lshmoe/comm/self/self.hpp"
#include "lshmoe/compress/codec.hpp"
#include "tests/compress/rows.hpp"

namespace lshmoe {
namespace {

using Costs = std::array<PhaseCost, kPhases>;
const PhaseCost& of(const Costs& costs, Phase phase) {
  return costs[static_cast<std::size_t>(phase)];
}

// Computes for so long, by the thread's own clock.
void compute(double seconds) {
  for (const double end = thread_seconds() + seconds; thread_seconds() < end;) {
  }
}

TEST(Phases, HaveNames) {
  std::set<std::string> names;
  for (std::size_t phase = 0; phase < kPhases; ++phase) {
    const auto name = name_of(static_cast<Phase>(phase));
    EXPECT_FALSE(name.empty()) << phase;
    names.insert(std::string(name));
  }
  EXPECT_EQ(names.size(), kPhases);
  EXPECT_EQ(name_of(Phase::other), "other");
  EXPECT_EQ(name_of(Phase::scatter), "scatter");
}

TEST(Phases, AreNotTimedWithoutARecorder) {
  { const PhaseScope timer(Phase::pack, 10); }
  PhaseRecorder recorder;
  EXPECT_EQ(of(recorder.costs(), Phase::pack).bytes, 0);
}

TEST(Phases, InsideOthersTakeTheirTime) {
  PhaseRecorder recorder;
  const double start = thread_seconds();
  {
    const PhaseScope outer(Phase::plan, 10);
    compute(0.004);
    {
      const PhaseScope inner(Phase::pack, 7);
      compute(0.008);
    }
    compute(0.002);
    { const PhaseScope again(Phase::pack, 5); }
  }
  compute(0.001);
  const double all = thread_seconds() - start;
  const Costs costs = recorder.costs();
  EXPECT_EQ(of(costs, Phase::plan).bytes, 10);
  EXPECT_EQ(of(costs, Phase::pack).bytes, 12);
  EXPECT_GE(of(costs, Phase::pack).seconds, 0.0079);
  EXPECT_GE(of(costs, Phase::plan).seconds, 0.0059);
  EXPECT_GE(of(costs, Phase::other).seconds, 0.0009);
  double sum = 0;
  for (const PhaseCost& cost : costs) {
    EXPECT_GE(cost.seconds, 0);
    sum += cost.seconds;
  }
  // Less the recorder's own, which is small beside them.
  EXPECT_LE(sum, all + 1e-4);
  EXPECT_GE(sum, 0.98 * all);
}

TEST(Phases, WaitingIsWallTimeOnly) {
  PhaseRecorder recorder;
  {
    const PhaseScope timer(Phase::load);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  const Costs costs = recorder.costs();
  EXPECT_GE(of(costs, Phase::load).wall_seconds, 0.0199);
  EXPECT_LT(of(costs, Phase::load).seconds, 0.01);
}

// What each way of coding goes through, and that little of its time is in no phase.
TEST(Phases, OfCodecs) {
  const at::Tensor seen = testing::clustered(2000, 256, 20, 0.3, 1).to(at::kBFloat16);
  const at::Tensor x = testing::clustered(2048, 256, 20, 0.3, 1).to(at::kBFloat16);
  const std::set<Phase> stages{Phase::load,     Phase::step_search, Phase::quantize, Phase::pack,
                               Phase::checksum, Phase::order,       Phase::project};
  for (const std::string setting : {"batch", "channels", "basis"}) {
    SCOPED_TRACE(setting);
    auto options = CodecOptions();
    if (setting != "batch") options.state("learned").transform(setting).sample_rows(2000);
    const auto codec = make_codec(options, {256, 0, Direction::dispatch, at::kBFloat16});
    codec->observe(seen, {});
    EXPECT_EQ(codec->refresh(*make_self_communicator()), setting != "batch");
    Encoded encoded;
    Costs encode, decode;
    {
      PhaseRecorder recorder;
      encoded = codec->encode(x, {1024, 1024});
      encode = recorder.costs();
    }
    {
      PhaseRecorder recorder;
      (void)codec->decode(encoded.bytes, encoded.bytes_per_group);
      decode = recorder.costs();
    }
    auto expected = stages;
    if (setting == "batch") expected.insert(Phase::plan);
    if (setting != "batch") expected.insert({Phase::nearest, Phase::assemble});
    if (setting == "basis") expected.insert(Phase::product);
    for (const Phase phase : expected) EXPECT_GT(of(encode, phase).seconds, 0) << name_of(phase);
    // Every row is read by the loops over rows: bytes of bfloat16 at least.
    for (const Phase phase : {Phase::load, Phase::step_search, Phase::quantize, Phase::pack,
                              Phase::order, Phase::project}) {
      EXPECT_GE(of(encode, phase).bytes, 2 * x.numel()) << name_of(phase);
    }
    for (const Phase phase : {Phase::unpack, Phase::reconstruct, Phase::scatter}) {
      EXPECT_GT(of(decode, phase).seconds, 0) << name_of(phase);
      EXPECT_GE(of(decode, phase).bytes, 4 * x.numel()) << name_of(phase);
    }
    EXPECT_GE(of(encode, Phase::checksum).bytes, encoded.bytes.numel() - 80);
    EXPECT_GE(of(decode, Phase::checksum).bytes, encoded.bytes.numel() - 80);
    EXPECT_EQ(of(decode, Phase::product).flops, setting == "basis" ? 2 * x.numel() * 256 : 0);
    EXPECT_EQ(of(encode, Phase::project).flops, 2 * x.numel() * 64);
    double sum = 0;
    for (const PhaseCost& cost : encode) sum += cost.seconds;
    EXPECT_LT(of(encode, Phase::other).seconds, 0.5 * sum);
  }
}

}  // namespace
}  // namespace lshmoe
