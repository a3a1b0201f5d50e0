// The order of long sums, which parcels depend on.

#include "lshmoe/kernels/lanes.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "lshmoe/kernels/quantize.hpp"

namespace lshmoe::kernels {
namespace {

std::vector<float> normal(std::int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> draw;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = draw(random);
  return values;
}

// Element i in lane i % lanes, the upper half folded onto the lower one until one is left.
template <class Real>
Real sum_in_lanes(const std::vector<Real>& values) {
  std::vector<Real> lane(values.size() < 1024 ? 32 : 128, Real{0});
  for (std::size_t i = 0; i < values.size(); ++i) lane[i % lane.size()] += values[i];
  while (lane.size() > 1) {
    const std::size_t half = lane.size() / 2;
    for (std::size_t j = 0; j < half; ++j) lane[j] += lane[j + half];
    lane.resize(half);
  }
  return lane[0];
}

const std::vector<std::int64_t>& sizes() {
  static const std::vector<std::int64_t> all{0,   1,   8,    31,   32,   33,   100,  255, 256,
                                             300, 384, 1023, 1024, 1100, 1279, 4096, 4103};
  return all;
}

TEST(LaneSum, HasItsOrder) {
  for (const std::int64_t count : sizes()) {
    const auto values = normal(count, 1);
    EXPECT_EQ(lane_sum<float>(count, [&](std::int64_t i) { return values[std::size_t(i)]; }),
              sum_in_lanes(values))
        << count;
  }
}

TEST(LaneSum, OfParts) {
  const auto values = normal(700, 2);
  LaneSum<float, kManyLanes> sum;
  for (const auto& [first, count] : {std::pair(0, 256), std::pair(256, 384), std::pair(640, 60)}) {
    sum.add(count, [&, from = first](std::int64_t i) { return values[std::size_t(from + i)]; });
  }
  std::vector<float> lane(128, 0.0F);
  for (std::size_t i = 0; i < values.size(); ++i) lane[i % 128] += values[i];
  for (std::size_t half = 64; half > 0; half /= 2) {
    for (std::size_t j = 0; j < half; ++j) lane[j] += lane[j + half];
  }
  EXPECT_EQ(sum.folded(), lane[0]);
}

template <class T>
void expect_reconstruction_error() {
  for (const std::int64_t count : sizes()) {
    const auto x = normal(count, 3), base = normal(count, 4), offset = normal(count, 5);
    std::vector<std::int32_t> q(x.size());
    const float step = 0.3F;
    for (const bool shifted : {false, true}) {
      std::vector<double> squares;
      for (std::size_t i = 0; i < x.size(); ++i) {
        q[i] = static_cast<std::int32_t>(std::lround((x[i] - base[i]) / step));
        const auto level = static_cast<float>(q[i]) - (shifted ? offset[i] : 0.0F);
        const float product = level * step;
        const double error = static_cast<double>(x[i]) -
                             static_cast<double>(to_float(from_float<T>(base[i] + product)));
        squares.push_back(error * error);
      }
      EXPECT_EQ(reconstruction_error<T>(x.data(), base.data(), q.data(), count, step,
                                        shifted ? offset.data() : nullptr),
                sum_in_lanes(squares))
          << count << " " << shifted;
    }
  }
}
TEST(ReconstructionError, IsTheSumOfSquares) {
  expect_reconstruction_error<float>();
  expect_reconstruction_error<Bfloat16>();
}

TEST(SquaredNorm, IsTheSumOfSquares) {
  for (const std::int64_t count : sizes()) {
    const auto x = normal(count, 6);
    std::vector<double> squares;
    for (const float value : x) squares.push_back(static_cast<double>(value) * value);
    EXPECT_EQ(squared_norm(x.data(), count), sum_in_lanes(squares)) << count;
  }
}

}  // namespace
}  // namespace lshmoe::kernels
