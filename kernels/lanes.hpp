#pragma once
// The order of long sums, on the CPU and the GPU alike: element i goes to lane i % lanes, each lane
// sums in order, then the lanes are folded in halves: 16 + 16, 8 + 8, ...

#include <cstdint>

#include "lshmoe/kernels/host_device.hpp"

namespace lshmoe::kernels {

/// Lanes of a sum of `count` values: a warp of a GPU, or a block of four.
inline constexpr int kFewLanes = 32, kManyLanes = 128;
LSHMOE_HOST_DEVICE constexpr int lanes_of(std::int64_t count) {
  return count < 1024 ? kFewLanes : kManyLanes;
}

/// A sum in kCount lanes, of values that come in parts.
template <class Real, int kCount>
class LaneSum {
 public:
  /// Adds value(i), i = 0 .. count - 1. count: a multiple of kCount, but for the last part.
  template <class Value>
  void add(std::int64_t count, Value value) {
    std::int64_t i = 0;
    for (; i + kCount <= count; i += kCount) {
      for (int j = 0; j < kCount; ++j) lane_[j] += value(i + j);
    }
    for (int j = 0; j < static_cast<int>(count - i); ++j) lane_[j] += value(i + j);
  }

  /// The sum of what was added; once.
  [[nodiscard]] Real folded() {
    for (int half = kCount / 2; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) lane_[j] += lane_[j + half];
    }
    return lane_[0];
  }

 private:
  Real lane_[kCount] = {};
};

namespace detail {
template <class Real, int kCount, class Value>
Real lane_sum(std::int64_t count, Value value) {
  LaneSum<Real, kCount> sum;
  sum.add(count, value);
  return sum.folded();
}
}  // namespace detail

/// Sum of value(i), i = 0 .. count - 1, as Real.
template <class Real, class Value>
Real lane_sum(std::int64_t count, Value value) {
  return lanes_of(count) == kFewLanes ? detail::lane_sum<Real, kFewLanes>(count, value)
                                      : detail::lane_sum<Real, kManyLanes>(count, value);
}

}  // namespace lshmoe::kernels
