#include "lshmoe/comm/cuda/staging.hpp"

#include <cuda_runtime_api.h>

#include <utility>

#include "lshmoe/comm/cuda/device.hpp"

namespace lshmoe::cuda {

PinnedBuffer::~PinnedBuffer() { cudaFreeHost(data_); }
PinnedBuffer::PinnedBuffer(PinnedBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
PinnedBuffer& PinnedBuffer::operator=(PinnedBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

std::byte* PinnedBuffer::get(std::size_t bytes) {
  if (bytes > bytes_) {
    check(cudaFreeHost(std::exchange(data_, nullptr)), "cudaFreeHost");
    bytes_ = 0;
    void* data = nullptr;
    // Usable from every device: ranks and threads need not share a context.
    check(cudaHostAlloc(&data, bytes, cudaHostAllocPortable), "pinned memory");
    data_ = static_cast<std::byte*>(data);
    bytes_ = bytes;
  }
  return data_;
}

Staging::Staging() = default;
Staging::~Staging() {
  if (copied_ == nullptr) return;
  cudaEventSynchronize(static_cast<cudaEvent_t>(copied_));  // the buffers are freed next
  cudaEventDestroy(static_cast<cudaEvent_t>(copied_));
}

void Staging::wait() {
  if (copied_ != nullptr) {
    check(cudaEventSynchronize(static_cast<cudaEvent_t>(copied_)), "a copy to the device");
  }
}

std::byte* Staging::to_host(const void* device, std::size_t bytes, kernels::cuda::Stream stream) {
  wait();
  std::byte* host = out_.get(bytes);
  if (bytes == 0) return host;
  check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream), "a copy to the host");
  check(cudaStreamSynchronize(stream), "a copy to the host");
  return host;
}

std::byte* Staging::room(std::size_t bytes) {
  wait();
  return in_.get(bytes);
}

void Staging::to_device(void* device, const std::byte* host, std::size_t bytes,
                        kernels::cuda::Stream stream) {
  if (bytes == 0) return;
  if (copied_ == nullptr) {
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
    copied_ = event;
  }
  check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream),
        "a copy to the device");
  check(cudaEventRecord(static_cast<cudaEvent_t>(copied_), stream), "cudaEventRecord");
}

}  // namespace lshmoe::cuda
