// Whether the CUDA runtime of this build works on this machine: prints the GPU, or what is wrong.
// Needs no torch, so that the answer comes within seconds.
//
// Exit status: 0 it works, 1 it does not, 77 there is no GPU.

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>

namespace {

constexpr int kNoGpu = 77;
constexpr std::size_t kBytes = std::size_t{1} << 20;

bool failed(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return false;
  std::printf("%s: %s (%s)\n", call, cudaGetErrorName(error), cudaGetErrorString(error));
  return true;
}

/// Host to device and back, through memory that both see.
bool copies() {
  void *seen = nullptr, *device = nullptr;
  if (failed(cudaHostAlloc(&seen, 2 * kBytes, cudaHostAllocMapped | cudaHostAllocPortable),
             "cudaHostAlloc") ||
      failed(cudaMalloc(&device, kBytes), "cudaMalloc")) {
    return false;
  }
  char* host = static_cast<char*>(seen);
  for (std::size_t i = 0; i < kBytes; ++i) host[i] = static_cast<char>(i * 7);
  if (failed(cudaMemcpy(device, host, kBytes, cudaMemcpyHostToDevice), "cudaMemcpy to the GPU") ||
      failed(cudaMemcpy(host + kBytes, device, kBytes, cudaMemcpyDeviceToHost),
             "cudaMemcpy from the GPU")) {
    return false;
  }
  const bool same = std::memcmp(host, host + kBytes, kBytes) == 0;
  if (!same) std::printf("what came back from the GPU is not what was sent there\n");
  return same;
}

}  // namespace

int main() {
  int driver = 0, runtime = 0, devices = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (failed(error, "cudaGetDeviceCount") || devices == 0) {
    std::printf("driver for CUDA %d, runtime %d, %d GPUs\n", driver, runtime, devices);
    // 0: no driver at all.
    return error == cudaErrorNoDevice || driver == 0 ? kNoGpu : 1;
  }
  cudaDeviceProp properties{};
  if (failed(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties") || !copies()) {
    return 1;
  }
  std::printf("%d x %s, compute capability %d.%d, %zu MiB, driver for CUDA %d, runtime %d\n",
              devices, properties.name, properties.major, properties.minor,
              properties.totalGlobalMem >> 20, driver, runtime);
}
