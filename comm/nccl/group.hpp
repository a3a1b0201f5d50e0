#pragma once
// NcclGroup: NCCL's communicator of one group of ranks, its calls and its waits.

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "lshmoe/comm/communicator.hpp"
#include "lshmoe/runtime/deadline.hpp"

struct ncclComm;

namespace lshmoe::nccl {

/// Device memory that only grows. Growing waits for the whole device.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  ~DeviceBuffer();
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  /// Fresh memory is set to zero, after what is queued on the stream.
  [[nodiscard]] std::byte* get(std::size_t bytes, kernels::cuda::Stream stream);

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

/// All calls are non-blocking ones of NCCL (ncclConfig_t::blocking = 0): each is followed by
/// polling until it is under way. Used by one thread at a time.
class NcclGroup {
 public:
  /// Nothing is made yet.
  explicit NcclGroup(Communicator& control) : control_(control) {}
  /// Ends NCCL's communicator where it is in order, aborts it where not.
  ~NcclGroup();
  NcclGroup(const NcclGroup&) = delete;
  NcclGroup& operator=(const NcclGroup&) = delete;

  /// One collective: from begin() to finish(), on one stream. `what` describes it for errors.
  /// Makes NCCL's communicator when it is not there yet. Collective.
  void begin(std::string what, kernels::cuda::Stream stream);
  /// Queues the sends and receives that `calls` makes, as one group.
  void queue(const std::function<void()>& calls);
  /// For `calls`; `data` is device memory.
  void send(const void* data, std::size_t bytes, int peer);
  void receive(void* data, std::size_t bytes, int peer);
  /// Queues a broadcast, in place.
  void broadcast(void* data, std::size_t bytes, int root);
  /// Waits for everything that is queued on the stream.
  void finish();

 private:
  void make();
  void settle(int result, const char* call);  // polls until the call is under way
  void poll(const char* call);                // throws for an asynchronous error
  void note(int result, const char* call);    // the first failure inside a group
  [[noreturn]] void fail(bool timed_out, const std::string& text);
  [[nodiscard]] std::string peers() const;

  Communicator& control_;
  ncclComm* comm_ = nullptr;
  int device_ = -1;
  void* done_ = nullptr;  // cudaEvent_t
  std::string dead_;

  // The collective that runs.
  std::string what_;
  kernels::cuda::Stream stream_ = nullptr;
  Deadline deadline_{0};
  std::vector<char> peers_;  // [ranks] 1: it sends or receives
  int failed_ = 0;           // ncclResult_t of a call inside a group
  const char* failed_call_ = "";
};

}  // namespace lshmoe::nccl
