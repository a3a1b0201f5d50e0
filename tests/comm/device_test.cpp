// The ranks' GPUs, and collectives of device memory that are staged through the host. What needs a
// GPU is skipped without one; how it is refused is tested here.

#include <gtest/gtest.h>

#include "lshmoe/comm/cuda/device.hpp"
#include "lshmoe/comm/cuda/staging.hpp"
#include "lshmoe/comm/self/self.hpp"
#include "tests/comm/device_checks.hpp"
#include "tests/support/errors.hpp"
#include "tests/support/main.hpp"

namespace lshmoe {
namespace {

using testing::expect_error;
using testing::session;
using testing::world;

int gpus() { return cuda::visible_devices().count; }

TEST(ChooseDevice, NoGpu) {
  if (gpus() > 0) GTEST_SKIP() << "there is a GPU";
  for (const bool share : {false, true}) {
    const DeviceChoice choice = session().choose_device(share);
    EXPECT_EQ(choice.index, -1);
    // Rank 0's problem, on every rank.
    EXPECT_EQ(choice.problem.rfind("no GPU for rank 0 on " + world()->host(0) + " (", 0), 0u)
        << choice.problem;
    EXPECT_NE(choice.problem.find("--device cpu"), std::string::npos) << choice.problem;
    EXPECT_EQ(choice.problem.find("()"), std::string::npos) << "no reason: " << choice.problem;
    if (cuda::configured()) {
      expect_error<InvalidArgument>("no GPU for rank 0",
                                    [&] { (void)session().select_device(share); });
    } else {
      expect_error<NotConfigured>("-DLSHMOE_CUDA=ON",
                                  [&] { (void)session().select_device(share); });
    }
  }
}

TEST(ChooseDevice, OneForEachRankOfAHost) {
  if (gpus() == 0) GTEST_SKIP() << "no GPU: " << cuda::visible_devices().why_none;
  const DeviceChoice alone = session().choose_device(), shared = session().choose_device(true);
  EXPECT_EQ(shared.problem, "");
  EXPECT_EQ(shared.index, session().local_rank() % gpus());
  if (gpus() >= world()->size()) {
    EXPECT_EQ(alone.problem, "");
    EXPECT_EQ(alone.index, session().local_rank());
  } else {
    EXPECT_EQ(alone.index, -1);
    EXPECT_NE(alone.problem.find("--share-gpu"), std::string::npos) << alone.problem;
    expect_error<InvalidArgument>(
        gpus() == 1 ? "1 GPU for its " : std::to_string(gpus()) + " GPUs for its ",
        [] { (void)session().select_device(); });
  }
}

TEST(Staging, CollectivesOfDeviceMemory) {
  if (gpus() == 0) GTEST_SKIP() << "no GPU: " << cuda::visible_devices().why_none;
  const int index = session().select_device(/*share_gpu=*/true);
  testing::check_device_collectives(*world(), at::Device(at::kCUDA, static_cast<int8_t>(index)));
}

TEST(Staging, RefusedWithoutCuda) {
  if (cuda::configured()) GTEST_SKIP() << "this build has CUDA";
  expect_error<NotConfigured>("-DLSHMOE_CUDA=ON", [] { cuda::Staging staging; });
  expect_error<NotConfigured>("-DLSHMOE_CUDA=ON", [] { (void)cuda::PinnedBuffer().get(1); });
  float value = 1;
  expect_error<NotConfigured>("-DLSHMOE_CUDA=ON", [&] {
    world()->all_reduce(std::span(&value, 1), Purpose::gradients, DeviceStream{});
  });
}

// Arguments are checked before anything is sent.
TEST(Staging, BadArguments) {
  const std::vector<std::int64_t> sizes(static_cast<std::size_t>(world()->size()), 0), none;
  expect_error("pass one of each per rank", [&] {
    world()->all_to_all_v(nullptr, none, nullptr, sizes, Purpose::dispatch, DeviceStream{});
  });
  expect_error("is no rank of", [&] {
    world()->broadcast(nullptr, 0, world()->size(), Purpose::control, DeviceStream{});
  });
}

}  // namespace
}  // namespace lshmoe
