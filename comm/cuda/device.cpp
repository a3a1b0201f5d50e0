#include "lshmoe/comm/cuda/device.hpp"

#include <cuda_runtime_api.h>

#include <cstring>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe::cuda {

bool configured() { return true; }

VisibleDevices visible_devices() {
  VisibleDevices devices;
  const cudaError_t code = cudaGetDeviceCount(&devices.count);
  if (code != cudaSuccess) {
    devices.count = 0;
    devices.why_none = cudaGetErrorString(code);
    (void)cudaGetLastError();  // it is told here, and not by the next CUDA call
  } else if (devices.count == 0) {
    devices.why_none = "CUDA sees none; CUDA_VISIBLE_DEVICES may hide them";
  }
  return devices;
}

std::array<std::uint8_t, 16> device_uuid(int device) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  std::array<std::uint8_t, 16> uuid{};
  static_assert(sizeof(properties.uuid) == uuid.size());
  std::memcpy(uuid.data(), &properties.uuid, uuid.size());
  return uuid;
}

void use_device(int device) { check(cudaSetDevice(device), "cudaSetDevice"); }

void check(int code, const char* what) {
  if (code == cudaSuccess) return;
  (void)cudaGetLastError();
  throw CudaError(detail::message(what, ": ", cudaGetErrorString(static_cast<cudaError_t>(code)),
                                  " (CUDA error ", code, ")"));
}

}  // namespace lshmoe::cuda
