#pragma once
// The order of long sums, on the CPU and the GPU alike: element i goes to lane i % lanes, each lane
// sums in order, then the lanes are folded in halves: 16 + 16, 8 + 8, ...

#include <algorithm>
#include <cstdint>

#include "lshmoe/kernels/host_device.hpp"

namespace lshmoe::kernels {

/// Lanes of a sum of `count` values: a warp of a GPU, or a block of four.
inline constexpr int kFewLanes = 32, kManyLanes = 128;
LSHMOE_HOST_DEVICE constexpr int lanes_of(std::int64_t count) {
  return count < 1024 ? kFewLanes : kManyLanes;
}

namespace detail {
template <class Real, int kCount, class Value>
Real lane_sum(std::int64_t count, Value value) {
  constexpr int kTile = 128 / sizeof(Real);  // lanes at a time: four vector registers
  constexpr int kPart = 8;
  Real lane[kCount];
  const std::int64_t full = count - count % kCount;
  for (int first = 0; first < kCount; first += kTile) {
    Real tile[kTile] = {};
    for (std::int64_t i = first; i < full; i += kCount) {
      for (int j = 0; j < kTile; ++j) tile[j] += value(i + j);
    }
    std::copy(tile, tile + kTile, lane + first);
  }
  std::int64_t i = full;
  for (; i + kPart <= count; i += kPart) {
    for (int j = 0; j < kPart; ++j) lane[i - full + j] += value(i + j);
  }
  for (; i < count; ++i) lane[i - full] += value(i);
  for (int half = kCount / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
  }
  return lane[0];
}
}  // namespace detail

/// Sum of value(i), i = 0 .. count - 1, as Real.
template <class Real, class Value>
Real lane_sum(std::int64_t count, Value value) {
  return lanes_of(count) == kFewLanes ? detail::lane_sum<Real, kFewLanes>(count, value)
                                      : detail::lane_sum<Real, kManyLanes>(count, value);
}

}  // namespace lshmoe::kernels
