// The nccl backend without a GPU: this program defines the functions of the CUDA runtime and of
// NCCL that the backend calls, over host memory and MPI, in place of theirs. So its slices and
// sums, its waits and its errors are tested on every machine; what NCCL itself does is not.

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>
#include <nccl.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "lshmoe/comm/mpi/adopt.hpp"
#include "lshmoe/comm/nccl/communicator.hpp"
#include "lshmoe/kernels/combine.hpp"
#include "lshmoe/kernels/cuda/combine.hpp"
#include "tests/comm/device_checks.hpp"
#include "tests/support/errors.hpp"
#include "tests/support/main.hpp"

namespace {

/// What the pretended NCCL does next.
enum class Next {
  work,
  hang,        // what is queued never ends
  hang_start,  // a communicator never becomes ready
  fail,        // an asynchronous error while waiting
  fail_call,   // a send is refused
};
Next next = Next::work;
int aborted = 0, destroyed = 0, open_groups = 0;

}  // namespace

struct ncclComm {
  MPI_Comm comm = MPI_COMM_NULL;
  int polls_left = 0;  // of ncclInProgress
};

namespace {

struct Transfer {
  bool send;
  void* data;
  std::size_t bytes;
  int peer;
};
std::vector<Transfer> transfers;
ncclComm* of_transfers = nullptr;

ncclResult_t begun(ncclComm* comm) {
  comm->polls_left = 3;
  return ncclInProgress;
}
ncclResult_t add(bool send, const void* data, std::size_t bytes, int peer, ncclComm* comm) {
  EXPECT_EQ(comm->polls_left, 0) << "a call before the last one was under way";
  EXPECT_EQ(open_groups, 1) << "a transfer outside of a group";
  if (next == Next::fail_call) return ncclInvalidArgument;
  transfers.push_back({send, const_cast<void*>(data), bytes, peer});
  of_transfers = comm;
  return ncclSuccess;
}

}  // namespace

extern "C" {

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  static int made = 0;
  std::memset(id, 0, sizeof *id);
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  const int color = 1 + rank + 1000 * made++;
  std::memcpy(id, &color, sizeof color);
  return ncclSuccess;
}
// All ranks of the world make a communicator at a time, each that of its group.
ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int size, ncclUniqueId id, int rank,
                                    ncclConfig_t* config) {
  EXPECT_EQ(config->blocking, 0);
  int color = 0, got = 0;
  std::memcpy(&color, &id, sizeof color);
  *comm = new ncclComm;
  MPI_Comm_split(MPI_COMM_WORLD, color, rank, &(*comm)->comm);
  MPI_Comm_size((*comm)->comm, &got);
  EXPECT_EQ(got, size);
  return begun(*comm);
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* state) {
  *state = next == Next::fail                                   ? ncclRemoteError
           : next == Next::hang_start || comm->polls_left-- > 0 ? ncclInProgress
                                                                : ncclSuccess;
  comm->polls_left = std::max(0, comm->polls_left);
  return ncclSuccess;
}
ncclResult_t ncclGroupStart() {
  ++open_groups;
  return ncclSuccess;
}
ncclResult_t ncclGroupEnd() {
  --open_groups;
  std::vector<MPI_Request> requests;
  if (next == Next::work) {
    for (const Transfer& t : transfers) {
      MPI_Request& request = requests.emplace_back();
      const int bytes = static_cast<int>(t.bytes);
      if (t.send) {
        MPI_Isend(t.data, bytes, MPI_BYTE, t.peer, 0, of_transfers->comm, &request);
      } else {
        MPI_Irecv(t.data, bytes, MPI_BYTE, t.peer, 0, of_transfers->comm, &request);
      }
    }
    MPI_Waitall(static_cast<int>(requests.size()), requests.data(), MPI_STATUSES_IGNORE);
  }
  const bool any = !transfers.empty();
  transfers.clear();
  return any ? begun(of_transfers) : ncclSuccess;
}
ncclResult_t ncclSend(const void* data, std::size_t count, ncclDataType_t, int peer,
                      ncclComm_t comm, cudaStream_t) {
  return add(true, data, count, peer, comm);
}
ncclResult_t ncclRecv(void* data, std::size_t count, ncclDataType_t, int peer, ncclComm_t comm,
                      cudaStream_t) {
  return add(false, data, count, peer, comm);
}
ncclResult_t ncclBroadcast(const void* send, void* recv, std::size_t count, ncclDataType_t,
                           int root, ncclComm_t comm, cudaStream_t) {
  EXPECT_EQ(send, recv);
  if (next == Next::work) MPI_Bcast(recv, static_cast<int>(count), MPI_BYTE, root, comm->comm);
  return begun(comm);
}
ncclResult_t ncclCommFinalize(ncclComm_t comm) { return begun(comm); }
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  ++destroyed;
  MPI_Comm_free(&comm->comm);
  delete comm;
  return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  ++aborted;
  delete comm;
  return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t result) {
  return result == ncclRemoteError ? "remote error" : "invalid argument";
}
const char* ncclGetLastError(ncclComm_t) { return "what NCCL\nsays"; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaMalloc(void** data, std::size_t bytes) {
  *data = std::malloc(bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* data) {
  std::free(data);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** data, std::size_t bytes, unsigned) {
  return cudaMalloc(data, bytes);
}
cudaError_t cudaFreeHost(void* data) { return cudaFree(data); }
cudaError_t cudaMemsetAsync(void* data, int value, std::size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(std::malloc(1));
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  std::free(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t) {
  return next == Next::work || next == Next::fail_call ? cudaSuccess : cudaErrorNotReady;
}

}  // extern "C"

namespace lshmoe {

namespace kernels::cuda {
void segment_sum(RowType type, void* out, const void* in, std::int64_t hidden,
                 const std::int64_t* offset, std::int64_t segments, const std::int64_t* index,
                 const void* weight, Stream /*stream*/) {
  kernels::segment_sum(type, out, in, hidden, offset, segments, index, weight);
}
}  // namespace kernels::cuda

namespace {

using testing::world;

constexpr DeviceStream kStream{};

std::shared_ptr<Communicator> fresh(double timeout_seconds) {
  return make_nccl_communicator(
      adopt_mpi(MPI_COMM_WORLD, {.name = "adopted", .timeout_seconds = timeout_seconds}));
}

class NcclOnHost : public ::testing::Test {
 protected:
  void SetUp() override { next = Next::work; }
  void TearDown() override {
    next = Next::work;
    EXPECT_EQ(open_groups, 0);
    world()->barrier();
  }
};

TEST_F(NcclOnHost, CollectivesAndGroups) {
  destroyed = aborted = 0;
  {
    const auto comm = fresh(60);
    testing::check_device_collectives(*comm, at::kCPU);
    const auto half = comm->split(comm->rank() % 2, -comm->rank(), "half");
    EXPECT_EQ(half->backend(), "nccl");
    testing::check_device_collectives(*half, at::kCPU);
    testing::check_device_broadcast(*comm, at::kCPU, 1000);
  }
  EXPECT_EQ(destroyed, 2);  // in order
  EXPECT_EQ(aborted, 0);
}

// The other backends: the same checks of what they stage.
TEST_F(NcclOnHost, Staged) { testing::check_device_collectives(*world(), at::kCPU); }

// All ranks see the same end: each names all others.
template <class E>
void expect_failure(Communicator& comm, Next what, const std::vector<std::string>& texts) {
  aborted = 0;
  next = what;
  std::vector<float> data(4096);  // a slice for each of 4 ranks
  const auto reduce = [&] { comm.all_reduce(std::span(data), Purpose::gradients, kStream); };
  std::string said;
  try {
    reduce();
    ADD_FAILURE() << "went on";
  } catch (const E& error) {
    said = error.what();
  } catch (const std::exception& error) {
    ADD_FAILURE() << "another error: " << error.what();
  }
  for (const std::string& text : texts) EXPECT_NE(said.find(text), std::string::npos) << said;
  EXPECT_EQ(said.find('\n'), std::string::npos) << said;
  for (int rank = 0; rank < comm.size(); ++rank) {
    const std::string name = "rank " + std::to_string(rank) + " on " + comm.host(rank);
    EXPECT_EQ(said.find(name) != std::string::npos, rank != comm.rank()) << said;
  }
  EXPECT_EQ(aborted, 1);
  next = Next::work;
  testing::expect_error<CommError>("is dead for device memory since an earlier error", reduce);
  comm.barrier();  // host memory still works
}

TEST_F(NcclOnHost, WhatNeverEndsTimesOut) {
  if (world()->size() == 1) GTEST_SKIP() << "one rank waits for nobody";
  const auto comm = fresh(0.5);
  testing::check_device_broadcast(*comm, at::kCPU, 8);
  expect_failure<Timeout>(*comm, Next::hang,
                          {"no end after 0.5 s in all_reduce for gradients of 16384 B on 'adopted' "
                           "over NCCL: waited for rank "});
}
TEST_F(NcclOnHost, AStartThatNeverEndsTimesOut) {
  if (world()->size() == 1) GTEST_SKIP() << "one rank waits for nobody";
  expect_failure<Timeout>(*fresh(0.5), Next::hang_start,
                          {"no answer for 0.5 s in ncclCommInitRankConfig", "waited for rank "});
}
TEST_F(NcclOnHost, AsynchronousErrors) {
  if (world()->size() == 1) GTEST_SKIP() << "one rank reduces alone";
  const auto comm = fresh(60);
  testing::check_device_broadcast(*comm, at::kCPU, 8);
  expect_failure<CommError>(
      *comm, Next::fail, {"failed in all_reduce for gradients", "remote error", "what NCCL says"});
}
TEST_F(NcclOnHost, RefusedCalls) {
  if (world()->size() == 1) GTEST_SKIP() << "one rank reduces alone";
  const auto comm = fresh(60);
  testing::check_device_broadcast(*comm, at::kCPU, 8);
  expect_failure<CommError>(*comm, Next::fail_call,
                            {"ncclSend failed in all_reduce for gradients", "invalid argument"});
}

// Only those that take part in an exchange are named.
TEST_F(NcclOnHost, PeersOfAnExchange) {
  if (world()->size() < 4) GTEST_SKIP() << "needs 4 ranks";
  const auto comm = fresh(0.5);
  testing::check_device_broadcast(*comm, at::kCPU, 8);
  const int peer = comm->rank() ^ 1;
  std::vector<std::int64_t> bytes(static_cast<std::size_t>(comm->size()), 0);
  bytes[static_cast<std::size_t>(peer)] = 10;
  std::vector<char> send(10), recv(10);
  next = Next::hang;
  testing::expect_error<Timeout>(
      "waited for rank " + std::to_string(peer) + " on " + comm->host(peer) + " (a rank hangs",
      [&] {
        comm->all_to_all_v(send.data(), bytes, recv.data(), bytes, Purpose::dispatch, kStream);
      });
}

// A rank that unwinds must not wait for its peers.
TEST_F(NcclOnHost, AbortedWhileUnwinding) {
  aborted = 0;
  try {
    const auto comm = fresh(60);
    testing::check_device_broadcast(*comm, at::kCPU, 8);
    throw 1;
  } catch (int) {
  }
  EXPECT_EQ(aborted, 1);
}

}  // namespace
}  // namespace lshmoe
