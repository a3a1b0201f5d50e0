#pragma once
// Device memory on its way through the host: what a backend that knows only host memory sends.

#include <cstddef>

#include "lshmoe/kernels/cuda/stream.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::cuda {

/// Owns page-locked host memory, which the GPU copies to and from by itself. Only grows.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  ~PinnedBuffer();
  PinnedBuffer(PinnedBuffer&& other) noexcept;
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept;

  /// At least `bytes` bytes; what they held is lost where it grows. Throws CudaError,
  /// NotConfigured.
  [[nodiscard]] std::byte* get(std::size_t bytes);

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

/// Two pinned buffers, one out and one in, and the copies to and from them. One collective at a
/// time. Everything throws CudaError, and NotConfigured in a build without CUDA.
class Staging {
 public:
  Staging();
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  /// Copies `bytes` bytes of device memory into the outgoing buffer, after what is queued on the
  /// stream, and waits for it. Valid until the next call.
  [[nodiscard]] std::byte* to_host(const void* device, std::size_t bytes,
                                   kernels::cuda::Stream stream);
  /// The incoming buffer, free for `bytes` bytes: waits for the last copy out of it.
  [[nodiscard]] std::byte* room(std::size_t bytes);
  /// Queues a copy from one of the two to device memory.
  void to_device(void* device, const std::byte* host, std::size_t bytes,
                 kernels::cuda::Stream stream);

  /// See keep_buffer_on_error.
  [[nodiscard]] PinnedBuffer& outgoing() { return out_; }

 private:
  void wait();  // for the last copy to the device

  PinnedBuffer out_, in_;
  void* copied_ = nullptr;  // cudaEvent_t behind that copy; null: none yet
};

}  // namespace lshmoe::cuda
