#pragma once
// What the threads of a block or warp do together.

#include "lshmoe/kernels/checksum.hpp"
#include "lshmoe/kernels/cuda/vector.cuh"
#include "lshmoe/kernels/lanes.hpp"

namespace lshmoe::kernels::cuda {

/// Shared memory of the size that the launch gives, aligned to 16 bytes.
__device__ inline unsigned char* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
#else
  return static_cast<unsigned char*>(testing::Fibres::instance().shared());
#endif
}

/// The lanes of a lane_sum (lanes.hpp), one a thread, folded. Every thread gets the sum.
template <int kThreads, class Real>
__device__ Real fold_lanes(Real value) {
  if constexpr (kThreads == kManyLanes) {
    __shared__ Real lane[kManyLanes];
    __shared__ Real sum;
    lane[threadIdx.x] = value;
    __syncthreads();
    if (threadIdx.x < 32) {
      const int t = static_cast<int>(threadIdx.x);
      value = (lane[t] + lane[t + 64]) + (lane[t + 32] + lane[t + 96]);
      for (int half = 16; half > 0; half /= 2) value += __shfl_down_sync(kAllLanes, value, half);
      if (t == 0) sum = value;
    }
    __syncthreads();
    return sum;
  } else {
    static_assert(kThreads == kFewLanes);
    for (int half = 16; half > 0; half /= 2) value += __shfl_down_sync(kAllLanes, value, half);
    return __shfl_sync(kAllLanes, value, 0);
  }
}

/// lane_sum of value(i) over a block of lanes_of(count) = kThreads threads.
template <class Real, int kThreads, class Value>
__device__ Real block_lane_sum(std::int64_t count, Value value) {
  Real sum = 0;
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) sum += value(i);
  return fold_lanes<kThreads>(sum);
}

/// Exclusive sums of one value a thread; *total: of all.
template <int kThreads>
__device__ std::int32_t exclusive_sum(std::int32_t value, std::int32_t* total) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  std::int32_t sum = value;
  for (int by = 1; by < 32; by *= 2) {
    const std::int32_t other = __shfl_up_sync(kAllLanes, sum, static_cast<unsigned>(by));
    if (lane >= by) sum += other;
  }
  if constexpr (kThreads == 32) {
    *total = __shfl_sync(kAllLanes, sum, 31);
    return sum - value;
  } else {
    __shared__ std::int32_t warp_sum[kThreads / 32];
    __syncthreads();
    if (lane == 31) warp_sum[threadIdx.x / 32] = sum;
    __syncthreads();
    std::int32_t before = 0, all = 0;
    for (int w = 0; w < kThreads / 32; ++w) {
      before += w < static_cast<int>(threadIdx.x / 32) ? warp_sum[w] : 0;
      all += warp_sum[w];
    }
    *total = all;
    return before + sum - value;
  }
}

/// The checksum (checksum.hpp) of `size` bytes whose 8 bytes from 8 * w on are word(w); bytes
/// beyond the size are not looked at. Four neighboring threads work together; whole warps call it.
template <class Word>
__device__ std::uint32_t checksum_by_four(Word word, std::uint64_t size, std::uint64_t seed) {
  using Lanes = ChecksumLanes;
  const int lane = static_cast<int>(threadIdx.x % 32), mine = lane % 4;
  std::uint64_t state = Lanes::start(mine, seed);
  for (std::uint64_t step = 0; step < size / 32; ++step) {
    state = Lanes::round(state, word(4 * step + static_cast<std::uint64_t>(mine)));
  }
  std::uint64_t lanes[4];
  for (int i = 0; i < 4; ++i) lanes[i] = __shfl_sync(kAllLanes, state, lane - mine + i);
  std::uint64_t hash = Lanes::fold(lanes, size);
  for (std::uint64_t at = size / 32 * 32; at < size; at += 8) {
    std::uint64_t value = word(at / 8);
    if (size - at < 8) value &= (std::uint64_t{1} << (8 * (size - at))) - 1;
    hash = Lanes::rest(hash, value);
  }
  return Lanes::finish(hash);
}

/// 8 bytes from any address before `end`; zeros from `end` on.
__device__ inline std::uint64_t load_before(const std::uint8_t* from, const std::uint8_t* end) {
  if (from + 16 <= end) return load_word(from);
  std::uint64_t word = 0;
  for (int i = 0; i < 8; ++i) {
    if (from + i < end) word |= std::uint64_t{from[i]} << (8 * i);
  }
  return word;
}

/// Copies size bytes between any two addresses, by the whole block. from: 16 bytes behind its end
/// must be readable.
__device__ inline void copy_bytes(std::uint8_t* to, const std::uint8_t* from, std::int64_t size) {
  const auto head = static_cast<std::int64_t>(-reinterpret_cast<std::uintptr_t>(to) & 7);
  const std::int64_t first = head < size ? head : size;
  for (std::int64_t i = threadIdx.x; i < first; i += blockDim.x) to[i] = from[i];
  const std::int64_t words = (size - first) / 8;
  auto* aligned = reinterpret_cast<std::uint64_t*>(to + first);
  for (std::int64_t i = threadIdx.x; i < words; i += blockDim.x) {
    aligned[i] = load_word(from + first + 8 * i);
  }
  for (std::int64_t i = first + 8 * words + threadIdx.x; i < size; i += blockDim.x) to[i] = from[i];
}

/// Number of the last of `count` groups with group[g].first <= row (groups by rising first).
template <class Group>
__device__ std::int64_t group_of(const Group* group, std::int64_t count, std::int64_t row) {
  std::int64_t low = 0, high = count;  // group[low].first <= row < group[high].first
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    if (group[middle].first <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace lshmoe::kernels::cuda
