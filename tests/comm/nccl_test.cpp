// The nccl backend. Its host side, and how it is refused, are tested everywhere; the rest is
// skipped where a rank has no GPU of its own.

#include <gtest/gtest.h>

#include "lshmoe/comm/cuda/device.hpp"
#include "lshmoe/comm/groups.hpp"
#include "lshmoe/comm/mpi/adopt.hpp"
#include "lshmoe/comm/nccl/communicator.hpp"
#include "tests/comm/device_checks.hpp"
#include "tests/support/errors.hpp"
#include "tests/support/main.hpp"

namespace lshmoe {
namespace {

using testing::expect_error;
using testing::session;
using testing::world;

TEST(NcclDisabled, SaysWhatToDo) {
  if (nccl_configured()) GTEST_SKIP() << "this build has NCCL";
  expect_error<NotConfigured>("-DLSHMOE_CUDA=ON", [] { (void)make_nccl_communicator(world()); });
}

class Nccl : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!nccl_configured()) GTEST_SKIP() << "this build has no NCCL";
    comm_ = make_nccl_communicator(world());
  }
  std::shared_ptr<Communicator> comm_;
};

TEST_F(Nccl, HostMemoryGoesByTheControlCommunicator) {
  EXPECT_EQ(comm_->backend(), "nccl");
  EXPECT_EQ(comm_->rank(), world()->rank());
  EXPECT_EQ(comm_->size(), world()->size());
  EXPECT_EQ(comm_->name(), world()->name());
  const Traffic before = world()->traffic(Purpose::gradients);
  double sum = comm_->rank() + 1;
  comm_->all_reduce(std::span(&sum, 1), ReduceOp::sum, Purpose::gradients);
  EXPECT_EQ(sum, comm_->size() * (comm_->size() + 1) / 2);
  const Traffic there = world()->traffic(Purpose::gradients),
                here = comm_->traffic(Purpose::gradients);
  EXPECT_EQ(here.bytes_sent, there.bytes_sent - before.bytes_sent);
  EXPECT_EQ(here.bytes_received, there.bytes_received - before.bytes_received);
  EXPECT_EQ(here.calls, there.calls - before.calls);

  EXPECT_EQ(all_gather(*comm_, comm_->rank(), Purpose::control).back(), comm_->size() - 1);
  const char letter = 'x';
  const auto blocks = comm_->gather(std::as_bytes(std::span(&letter, 1)), 0, Purpose::checkpoint);
  EXPECT_EQ(blocks.size(), comm_->rank() == 0 ? static_cast<std::size_t>(comm_->size()) : 0u);
  int number = comm_->rank() == 0 ? 42 : 0;
  comm_->broadcast(&number, sizeof number, 0, Purpose::control);
  EXPECT_EQ(number, 42);
  comm_->barrier();
}

TEST_F(Nccl, SplitGivesItsOwnKind) {
  const ExpertGroups groups = make_expert_groups(comm_);
  for (const auto& group :
       {groups.world, groups.expert, groups.replica, groups.node, groups.rail}) {
    EXPECT_EQ(group->backend(), "nccl");
  }
  EXPECT_EQ(groups.expert->size(), world()->size());
  EXPECT_EQ(groups.expert->name(), world()->name() + "/expert");
  EXPECT_EQ(groups.replica->size(), 1);
  groups.expert->barrier();
}

TEST_F(Nccl, WithoutAGpuTheFirstDeviceCallFails) {
  if (cuda::visible_devices().count > 0) GTEST_SKIP() << "there is a GPU";
  for (int attempt = 0; attempt < 2; ++attempt) {
    expect_error<CudaError>(
        "CUDA error", [&] { comm_->broadcast(nullptr, 8, 0, Purpose::control, DeviceStream{}); });
  }
  comm_->barrier();  // no rank waits for another's id
}

TEST_F(Nccl, CollectivesOfDeviceMemory) {
  const DeviceChoice choice = session().choose_device();
  if (choice.index < 0) GTEST_SKIP() << choice.problem;
  const at::Device device(at::kCUDA, static_cast<int8_t>(choice.index));
  testing::check_device_collectives(*comm_, device);
  // Groups split from it, each with an id of its own, at work in turn.
  const auto half = comm_->split(comm_->rank() % 2, comm_->rank(), "half");
  testing::check_device_collectives(*half, device);
  testing::check_device_broadcast(*comm_, device, 1000);
}

TEST_F(Nccl, EqualBitsInEveryRun) {
  const DeviceChoice choice = session().choose_device();
  if (choice.index < 0) GTEST_SKIP() << choice.problem;
  const at::Device device(at::kCUDA, static_cast<int8_t>(choice.index));
  at::manual_seed(7 + static_cast<std::uint64_t>(comm_->rank()));
  const at::Tensor values = at::randn({3'000'017}).to(device);
  at::Tensor first;
  for (int run = 0; run < 3; ++run) {
    at::Tensor sum = values.clone();
    comm_->all_reduce(std::span(sum.data_ptr<float>(), static_cast<std::size_t>(sum.numel())),
                      Purpose::gradients, testing::current_stream(device));
    if (!first.defined()) first = sum;
    EXPECT_TRUE(at::equal(sum, first)) << "run " << run;
  }
}

TEST_F(Nccl, APeerThatDoesNotComeIsNamed) {
  const DeviceChoice choice = session().choose_device();
  if (choice.index < 0) GTEST_SKIP() << choice.problem;
  if (world()->size() < 2) GTEST_SKIP() << "one rank waits for nobody";
  const at::Device device(at::kCUDA, static_cast<int8_t>(choice.index));
  const c10::DeviceGuard guard(device);
  comm_ =
      make_nccl_communicator(adopt_mpi(MPI_COMM_WORLD, {.name = "adopted", .timeout_seconds = 5}));
  // Everybody is there when NCCL starts; then the last rank stays away.
  testing::check_device_broadcast(*comm_, device, 8);
  const bool last = comm_->rank() == comm_->size() - 1;
  if (!last) {
    at::Tensor data = at::zeros({8}, at::dtype(at::kFloat).device(device));
    const auto reduce = [&] {
      comm_->all_reduce(std::span(data.data_ptr<float>(), 8), Purpose::gradients,
                        testing::current_stream(device));
    };
    const std::string absent = "rank " + std::to_string(comm_->size() - 1) + " on ";
    try {
      reduce();
      ADD_FAILURE() << "went on alone";
    } catch (const CommError& error) {  // Timeout, or what NCCL finds first
      EXPECT_NE(std::string(error.what()).find(absent), std::string::npos) << error.what();
      EXPECT_NE(std::string(error.what()).find("all_reduce for gradients"), std::string::npos)
          << error.what();
    }
    expect_error<CommError>("is dead for device memory", reduce);
  }
  world()->barrier();
}

}  // namespace
}  // namespace lshmoe
