#pragma once
// Loads and stores of several elements at once; loads of any alignment.

#include <cstdint>

#include "lshmoe/kernels/bfloat16.hpp"

namespace lshmoe::kernels::cuda {

/// Threads of a block, where nothing else is said.
inline constexpr int kBlock = 128;
inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;

template <class T, int kValues>
struct alignas(sizeof(T) * kValues) Vector {
  T value[kValues];
};

template <int kValues, class T>
__device__ inline Vector<T, kValues> load(const T* from) {
  return *reinterpret_cast<const Vector<T, kValues>*>(from);
}
template <class T, int kValues>
__device__ inline void store(T* to, const Vector<T, kValues>& values) {
  *reinterpret_cast<Vector<T, kValues>*>(to) = values;
}

/// 8 bytes from any address. Reads whole aligned words, so up to 7 bytes before and behind them
/// within those words.
__device__ inline std::uint64_t load_word(const std::uint8_t* from) {
  const auto address = reinterpret_cast<std::uintptr_t>(from);
  const auto* word = reinterpret_cast<const std::uint64_t*>(address & ~std::uintptr_t{7});
  const int shift = 8 * static_cast<int>(address & 7);
  return shift == 0 ? word[0] : word[0] >> shift | word[1] << (64 - shift);
}

/// True when rows of row_bytes from all of the pointers can be read 16 bytes at a time.
template <class... Pointers>
inline bool aligned16(std::size_t row_bytes, Pointers... pointers) {
  return ((reinterpret_cast<std::uintptr_t>(pointers) | ...) % 16) == 0 && row_bytes % 16 == 0;
}

}  // namespace lshmoe::kernels::cuda
