// The CUDA kernels on a GPU against the CPU's own loops. Skipped without one.

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <map>
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

/// Memory of the host that the GPU sees too, at the same address. Not managed memory: that needs
/// page faults of the GPU, which not every virtual machine has. What is given back is kept for the
/// next of that size: the driver takes long for each of many thousands.
template <class T>
struct MappedAllocator {
  using value_type = T;
  MappedAllocator() = default;
  template <class U>
  MappedAllocator(const MappedAllocator<U>&) {}
  T* allocate(std::size_t count) {
    std::vector<void*>& kept = kept_of(count * sizeof(T));
    void* memory = nullptr;
    if (!kept.empty()) {
      memory = kept.back();
      kept.pop_back();
    } else if (cudaHostAlloc(&memory, count * sizeof(T),
                             cudaHostAllocMapped | cudaHostAllocPortable) != cudaSuccess) {
      throw std::bad_alloc();
    }
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, std::size_t count) { kept_of(count * sizeof(T)).push_back(memory); }
  template <class U>
  bool operator==(const MappedAllocator<U>&) const {
    return true;
  }

 private:
  static std::vector<void*>& kept_of(std::size_t bytes) {
    static std::map<std::size_t, std::vector<void*>> kept;
    return kept[bytes];
  }
};
template <class T>
using Vector = std::vector<T, MappedAllocator<T>>;

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
