// The CUDA kernels on a GPU against the CPU's own loops. Skipped without one.

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <new>
#include <vector>

#include "lshmoe/kernels/cuda/combine.hpp"
#include "lshmoe/kernels/cuda/formats.hpp"
#include "lshmoe/kernels/cuda/grid.hpp"
#include "lshmoe/kernels/cuda/lsh.hpp"
#include "lshmoe/kernels/cuda/parcel.hpp"
#include "lshmoe/kernels/cuda/plan.hpp"
#include "lshmoe/kernels/cuda/row_coder.hpp"
#include "lshmoe/kernels/cuda/rows.hpp"

namespace lshmoe::kernels {
namespace {

/// Memory that the GPU and the CPU see.
template <class T>
struct ManagedAllocator {
  using value_type = T;
  ManagedAllocator() = default;
  template <class U>
  ManagedAllocator(const ManagedAllocator<U>&) {}
  T* allocate(std::size_t count) {
    void* memory = nullptr;
    if (cudaMallocManaged(&memory, count * sizeof(T)) != cudaSuccess) throw std::bad_alloc();
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, std::size_t) { cudaFree(memory); }
  template <class U>
  bool operator==(const ManagedAllocator<U>&) const {
    return true;
  }
};
template <class T>
using Vector = std::vector<T, ManagedAllocator<T>>;

const char* why_not() {
  // Read when the driver starts: the launchers return when their kernels have ended.
  static const bool blocking = setenv("CUDA_LAUNCH_BLOCKING", "1", /*overwrite=*/1) == 0;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return "no CUDA device";
  return blocking ? nullptr : "CUDA_LAUNCH_BLOCKING cannot be set";
}
constexpr std::int64_t kRows[] = {0, 1, 31, 32, 33, 200, 4097};

}  // namespace
}  // namespace lshmoe::kernels

#include "tests/kernels/cuda_kernels_checks.hpp"
