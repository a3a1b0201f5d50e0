// What bounds are relative to: the norm of a row, or three times the median.

#include "lshmoe/kernels/reference_norm.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace lshmoe::kernels {
namespace {

TEST(ReferenceNorm, BinsAreEighthsOfAnOctave) {
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> exponent(-149, 140);
  for (int i = 0; i < 10000; ++i) {
    const double norm = std::exp2(exponent(random)), squared = norm * norm;
    const auto want = static_cast<int>(std::floor(4 * std::log2(squared)));
    EXPECT_EQ(norm_bin(squared) + 4 * kLeastOctave, want) << norm;
    const double cap = norm_cap(norm_bin(squared));
    EXPECT_LE(cap, 3 * norm * (1 + 1e-15));
    EXPECT_GT(cap, 3 * norm * std::exp2(-0.125) * (1 - 1e-15));
  }
  // Limits belong to the bin that they begin.
  for (int octave = -298; octave < 290; ++octave) {
    const double limit = std::ldexp(1.0, octave);
    EXPECT_EQ(norm_bin(limit), 4 * (octave - kLeastOctave));
    EXPECT_EQ(norm_bin(std::nextafter(limit, 0.0)), 4 * (octave - kLeastOctave) - 1);
    if (octave % 2 == 0) {
      EXPECT_EQ(norm_cap(norm_bin(limit)), std::ldexp(3.0, octave / 2));
    }
  }
  for (int quarter = 0; quarter < 4; ++quarter) {
    EXPECT_EQ(quarter_octave(quarter), std::exp2(quarter / 4.0));
  }
}

TEST(ReferenceNorm, WhatHasNoNormIsNotCounted) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  const double none[] = {0.0, -0.0, kInf, std::nan("")};
  for (const double squared : none) EXPECT_EQ(norm_bin(squared), -1) << squared;
  EXPECT_EQ(norm_cap(none, nullptr, 4), kInf);
  EXPECT_EQ(norm_cap(none, nullptr, 0), kInf);
  const double some[] = {0, 0, 0, 16, 0};
  EXPECT_EQ(norm_cap(some, nullptr, 5), 12);
  // Beyond all rows of fp32: the first and the last bin.
  EXPECT_EQ(norm_bin(std::numeric_limits<double>::denorm_min()), 0);
  EXPECT_EQ(norm_bin(std::numeric_limits<double>::max()), kNormBins - 1);
  const double least = std::numeric_limits<float>::denorm_min();
  EXPECT_GT(norm_bin(least * least), 0);
  const double most = std::numeric_limits<float>::max();
  EXPECT_LT(norm_bin(most * most * 1e6), kNormBins - 1);
}

TEST(ReferenceNorm, CapIsThreeMedians) {
  std::mt19937 random(2);
  for (const int rows : {1, 2, 3, 10, 101, 5000}) {
    std::vector<double> squared;
    std::lognormal_distribution<double> draw(0, 4);
    for (int i = 0; i < rows; ++i) squared.push_back(draw(random));
    std::vector<std::int64_t> number;  // each row but the first two or three times
    for (int i = 1; i < 2 * rows + 3; ++i) number.push_back(i % rows);
    for (const bool numbered : {false, true}) {
      std::vector<double> all = squared;
      if (numbered) {
        all.clear();
        for (const auto i : number) all.push_back(squared[static_cast<std::size_t>(i)]);
      }
      std::sort(all.begin(), all.end());
      const double median = all[(all.size() - 1) / 2];
      const double want = 3 * std::exp2(std::floor(4 * std::log2(median)) / 8);
      EXPECT_DOUBLE_EQ(norm_cap(squared.data(), numbered ? number.data() : nullptr,
                                static_cast<std::int64_t>(all.size())),
                       want);
    }
  }
}

TEST(ReferenceNorm, OfAGroupIsTheRmsOfRowsThatAreNotZero) {
  for (const int rows : {0, 1, 5, 1500}) {
    std::vector<double> norm;
    double squares = 0, counted = 0;
    for (int i = 0; i < rows; ++i) {
      norm.push_back(i % 3 == 0 ? 0.0 : i % 7);
      const double reference = std::min(norm.back(), 4.0);
      squares += reference * reference;
      counted += norm.back() > 0 ? 1 : 0;
    }
    const double want = counted > 0 ? std::sqrt(squares / counted) : 0;
    EXPECT_NEAR(group_reference(norm.data(), rows, 4), want, 1e-12 * want);
  }
}

}  // namespace
}  // namespace lshmoe::kernels
