#pragma once
// The GPUs that this process sees. Local; no CUDA context is made but by use_device.

#include <array>
#include <cstdint>
#include <string>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe::cuda {

/// Whether this build has CUDA.
[[nodiscard]] bool configured();

struct VisibleDevices {
  int count = 0;
  std::string why_none;  ///< where count is 0
};
[[nodiscard]] VisibleDevices visible_devices();

/// What identifies a GPU, whatever number a process has for it. Throws CudaError, NotConfigured.
[[nodiscard]] std::array<std::uint8_t, 16> device_uuid(int device);

/// Makes it the current device of this thread. Throws CudaError, NotConfigured.
void use_device(int device);

/// Throws CudaError with `what` and the error's text unless `code`, a cudaError_t, is cudaSuccess.
void check(int code, const char* what);

}  // namespace lshmoe::cuda
