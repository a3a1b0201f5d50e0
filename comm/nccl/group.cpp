#include "lshmoe/comm/nccl/group.hpp"

#include <cuda_runtime_api.h>
#include <nccl.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <future>
#include <memory>
#include <thread>
#include <utility>

#include "lshmoe/comm/cuda/device.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::nccl {
namespace {

using cuda::check;
using detail::message;

/// Polls quickly for the first milliseconds, which most exchanges take, then sleeps between.
class Pause {
 public:
  void operator()() {
    if (std::chrono::steady_clock::now() - begin_ < std::chrono::milliseconds(5)) {
      ::sched_yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }

 private:
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

std::string text_of(int result) {
  return message(ncclGetErrorString(static_cast<ncclResult_t>(result)),
                 "; NCCL says: ", ncclGetLastError(nullptr));
}

/// Ends the kernels that wait for peers and frees the communicator. NCCL asks all ranks to do it
/// and may wait for those that do not, so it gets a thread and some seconds; after them it is left
/// alone.
void abort_group(ncclComm* comm, int device) {
  auto ended = std::make_shared<std::promise<void>>();
  const std::future<void> end = ended->get_future();
  std::thread([comm, device, ended] {
    cudaSetDevice(device);
    ncclCommAbort(comm);
    ended->set_value();
  }).detach();
  end.wait_for(std::chrono::seconds(10));
}

std::string one_line(std::string text) {
  std::replace(text.begin(), text.end(), '\n', ' ');
  while (!text.empty() && text.back() == ' ') text.pop_back();
  return text;
}

}  // namespace

DeviceBuffer::~DeviceBuffer() { cudaFree(data_); }

std::byte* DeviceBuffer::get(std::size_t bytes, kernels::cuda::Stream stream) {
  if (bytes > bytes_) {
    check(cudaFree(std::exchange(data_, nullptr)), "cudaFree");
    bytes_ = 0;
    void* data = nullptr;
    check(cudaMalloc(&data, bytes), "scratch memory of a reduction");
    data_ = static_cast<std::byte*>(data);
    bytes_ = bytes;
    check(cudaMemsetAsync(data_, 0, bytes, stream), "cudaMemsetAsync");
  }
  return data_;
}

NcclGroup::~NcclGroup() {
  if (done_ != nullptr) cudaEventDestroy(static_cast<cudaEvent_t>(done_));
  if (comm_ == nullptr) return;
  // Nothing is queued: every collective has been waited for. While an exception unwinds the peers
  // may not come here, and finalizing waits for those of this host.
  ncclResult_t state = ncclInternalError;
  if (std::uncaught_exceptions() == 0) {
    const Deadline deadline(std::min(10.0, control_.timeout_seconds()));
    state = ncclCommFinalize(comm_);
    Pause pause;
    while (state == ncclInProgress && !deadline.expired()) {
      pause();
      if (ncclCommGetAsyncError(comm_, &state) != ncclSuccess) state = ncclInternalError;
    }
  }
  if (state == ncclSuccess) {
    ncclCommDestroy(comm_);
  } else {
    abort_group(comm_, device_);
  }
}

void NcclGroup::begin(std::string what, kernels::cuda::Stream stream) {
  if (!dead_.empty()) {
    throw CommError("communicator '" + control_.name() +
                    "' is dead for device memory since an earlier error (" + dead_ +
                    "): end the job and restart it from a checkpoint");
  }
  what_ = std::move(what);
  stream_ = stream;
  deadline_ = Deadline(control_.timeout_seconds());
  peers_.assign(static_cast<std::size_t>(control_.size()), 0);
  if (comm_ == nullptr) make();
}

void NcclGroup::make() {
  check(cudaGetDevice(&device_), "cudaGetDevice");
  // Rank 0's failure must reach the others, or they would wait for its id.
  struct Id {
    ncclUniqueId id;
    int result;
  } id{};
  if (control_.rank() == 0) id.result = ncclGetUniqueId(&id.id);
  control_.broadcast(&id, sizeof id, 0, Purpose::control);
  if (id.result != ncclSuccess) {
    fail(false,
         message("rank ", control_.world_rank(0), " could not start NCCL for '", control_.name(),
                 "' (", ncclGetErrorString(static_cast<ncclResult_t>(id.result)),
                 "): set NCCL_DEBUG=WARN to see why, or use the mpi backend"));
  }
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  done_ = event;
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  deadline_ = Deadline(control_.timeout_seconds());
  settle(ncclCommInitRankConfig(&comm_, control_.size(), id.id, control_.rank(), &config),
         "ncclCommInitRankConfig");
}

void NcclGroup::queue(const std::function<void()>& calls) {
  const OnDevice on_device(device_);
  failed_ = ncclSuccess;
  settle(ncclGroupStart(), "ncclGroupStart");
  calls();
  const ncclResult_t end = ncclGroupEnd();  // also after a failure: a group must be closed
  if (failed_ != ncclSuccess) settle(failed_, failed_call_);
  settle(end, "ncclGroupEnd");
}

void NcclGroup::send(const void* data, std::size_t bytes, int peer) {
  if (bytes == 0) return;
  peers_[static_cast<std::size_t>(peer)] = 1;
  note(ncclSend(data, bytes, ncclInt8, peer, comm_, stream_), "ncclSend");
}
void NcclGroup::receive(void* data, std::size_t bytes, int peer) {
  if (bytes == 0) return;
  peers_[static_cast<std::size_t>(peer)] = 1;
  note(ncclRecv(data, bytes, ncclInt8, peer, comm_, stream_), "ncclRecv");
}

void NcclGroup::broadcast(void* data, std::size_t bytes, int root) {
  if (bytes == 0) return;
  const OnDevice on_device(device_);
  settle(ncclBroadcast(data, data, bytes, ncclInt8, root, comm_, stream_), "ncclBroadcast");
}

void NcclGroup::finish() {
  const OnDevice on_device(device_);
  const auto done = static_cast<cudaEvent_t>(done_);
  check(cudaEventRecord(done, stream_), "cudaEventRecord");
  Pause pause;
  for (cudaError_t code; (code = cudaEventQuery(done)) != cudaSuccess; pause()) {
    if (code != cudaErrorNotReady) {
      (void)cudaGetLastError();
      fail(false, message("the GPU failed in ", what_, " (", cudaGetErrorString(code),
                          "): the error may be of work queued before it"));
    }
    (void)cudaGetLastError();  // cudaErrorNotReady is no error to be found later
    poll("the exchange");
    if (deadline_.expired()) {
      fail(true, message("no end after ", control_.timeout_seconds(), " s in ", what_,
                         ": waited for ", peers(),
                         " (a rank hangs, died or is slow): look at what those ranks do; raise "
                         "--timeout if they were only slow"));
    }
  }
  poll("the exchange");
}

void NcclGroup::note(int result, const char* call) {
  if (result == ncclSuccess || result == ncclInProgress || failed_ != ncclSuccess) return;
  failed_ = result;
  failed_call_ = call;
}

void NcclGroup::settle(int result, const char* call) {
  Pause pause;
  while (result == ncclInProgress) {
    if (deadline_.expired()) {
      fail(true, message("no answer for ", control_.timeout_seconds(), " s in ", call, " for ",
                         what_, ": waited for ", peers(),
                         " (a rank did not come, or NCCL finds no way to it): look at what those "
                         "ranks do, and set NCCL_DEBUG=INFO to see the network that NCCL uses"));
    }
    pause();
    ncclResult_t state = ncclSuccess;
    const ncclResult_t asked = ncclCommGetAsyncError(comm_, &state);
    result = asked == ncclSuccess ? state : asked;
  }
  if (result != ncclSuccess) {
    fail(false, message(call, " failed in ", what_, " with ", peers(), " (", text_of(result),
                        "): set NCCL_DEBUG=WARN to see more, or use the mpi backend"));
  }
}

void NcclGroup::poll(const char* call) {
  ncclResult_t state = ncclSuccess;
  const ncclResult_t asked = ncclCommGetAsyncError(comm_, &state);
  if (asked != ncclSuccess) state = asked;
  if (state == ncclSuccess || state == ncclInProgress) return;
  fail(false, message(call, " failed in ", what_, " with ", peers(), " (", text_of(state),
                      "): look at those ranks' logs and at the network"));
}

void NcclGroup::fail(bool timed_out, const std::string& text) {
  dead_ = one_line(text);
  // So that the stream and its buffers become free. One that did not become ready is aborted too.
  if (comm_ != nullptr) abort_group(std::exchange(comm_, nullptr), device_);
  if (timed_out) throw Timeout(dead_);
  throw CommError(dead_);
}

std::string NcclGroup::peers() const {
  // Those of the sends and receives so far; before them, and in a broadcast, all.
  const bool all = std::find(peers_.begin(), peers_.end(), 1) == peers_.end();
  std::string text;
  for (int rank = 0; rank < control_.size(); ++rank) {
    if (rank == control_.rank() || !(all || peers_[static_cast<std::size_t>(rank)])) continue;
    text += message(text.empty() ? "" : ", ", "rank ", control_.world_rank(rank), " on ",
                    control_.host(rank));
  }
  return text.empty() ? "no other rank" : text;
}

}  // namespace lshmoe::nccl
