// Steps, quantized values and their packing: round trips, limits, and the bound of the step search.

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <vector>

#include "lshmoe/kernels/bands.hpp"
#include "lshmoe/kernels/quantize.hpp"

namespace lshmoe::kernels {
namespace {

std::int32_t half_of(int index) {
  return static_cast<std::int32_t>((kAlphabetSizes[index] - 1) / 2);
}

// Least b with 2^b >= size^count, in long double (exact enough: no power here is near one of two).
int bits_of(std::uint32_t size, int count) {
  return static_cast<int>(std::ceil(count * std::log2(static_cast<long double>(size)) - 1e-12L));
}
// Numbers of up to 8 values; from 127 on the values go one by one.
std::int64_t band_bits_of(int index, int count) {
  const std::uint32_t size = kAlphabetSizes[index];
  if (size >= 127) return std::int64_t{count} * bits_of(size, 1);
  return count <= 8 ? bits_of(size, count) : bits_of(size, 8) + bits_of(size, count - 8);
}

TEST(Alphabets, AreOddAndKnownByIndex) {
  // On the wire: a parcel's band indices mean these sizes.
  const std::uint32_t want[] = {1, 3, 5, 7, 9, 11, 15, 19, 23, 31, 47, 63, 127, 511, 4095, 65535};
  EXPECT_TRUE(std::equal(std::begin(want), std::end(want), std::begin(kAlphabetSizes)));
  for (int i = 0; i < kAlphabets; ++i) {
    for (int count = 1; count <= kBandValues; ++count) {
      EXPECT_EQ(band_bits(i, count), band_bits_of(i, count)) << i << " " << count;
    }
  }
}

TEST(Alphabets, LeastThatHolds) {
  for (std::int32_t max_abs = 0; max_abs <= kMaxQuantized; ++max_abs) {
    const int index = alphabet_for(max_abs);
    ASSERT_GE(half_of(index), max_abs);
    ASSERT_TRUE(index == 0 || half_of(index - 1) < max_abs) << max_abs;
  }
}

// unpack_bands gives these digits for the number, in both halves of a band.
bool same_in_a_band(int index, std::uint64_t number, const std::uint32_t* digit) {
  std::uint8_t stream[24] = {};
  put_bits(stream, 0, number);
  put_bits(stream, band_bits(index, 8), number);
  const auto alphabet = static_cast<std::uint8_t>(index);
  std::int32_t q[16];
  bool same = unpack_bands(q, stream, 16, &alphabet);
  for (int i = 0; i < 16; ++i) {
    same &= q[i] + half_of(index) == static_cast<std::int32_t>(digit[i % 8]);
  }
  return same;
}

TEST(Digits, SplitUndoesJoin) {
  for (int i = 1; i < kFirstWideAlphabet; ++i) {
    const Alphabet& alphabet = kAlphabetTable.alphabet[i];
    const std::uint64_t a = alphabet.size, a4 = a * a * a * a;
    const auto check = [&](std::uint64_t number) {
      std::uint32_t digit[8];
      split_digits(alphabet, number, digit);
      std::uint64_t rest = number;
      bool right = true;
      for (const std::uint32_t d : digit) {
        right &= d == rest % a;
        rest /= a;
      }
      return right && rest == 0 && join_digits(alphabet, digit) == number &&
             same_in_a_band(i, number, digit);
    };
    // The lower four digits and the upper ones are split alike: all of them once each (a step
    // prime to everything for the large alphabets), then the ends.
    std::int64_t wrong = 0;
    const std::uint64_t step = a4 > 2000000 ? 7 : 1;
    for (std::uint64_t n = 0; n < a4; n += step) wrong += !check(n + a4 * (a4 - 1 - n));
    for (std::uint64_t n = 0; n < std::min<std::uint64_t>(a4, 2000); ++n)
      wrong += !check(n * a4) + !check(a4 * a4 - 1 - n);
    EXPECT_EQ(wrong, 0) << "alphabet of " << a;
  }
}

// Packs and unpacks; false unless the values come back and the payload has the bits promised.
bool round_trip(const std::vector<std::int32_t>& q) {
  const auto count = static_cast<std::int64_t>(q.size());
  std::vector<std::uint8_t> index(q.size() / 16 + 1, 99);
  const std::int64_t bits = choose_alphabets(index.data(), q.data(), count);
  if (bits != payload_bits(index.data(), count)) return false;
  const auto bytes = static_cast<std::size_t>((bits + 7) / 8);
  std::vector<std::uint8_t> stream(bytes + 8, 0);
  pack_bands(stream.data(), q.data(), count, index.data());
  // Nothing beyond the payload; and what lies there does not matter.
  if (bits % 8 != 0 && stream[bytes - 1] >> (bits % 8) != 0) return false;
  for (std::size_t i = bytes; i < stream.size(); ++i) {
    if (stream[i] != 0) return false;
    stream[i] = 0xA5;
  }
  std::vector<std::int32_t> back(q.size() + 1, 12345);
  const bool valid = unpack_bands(back.data(), stream.data(), count, index.data());
  return valid && back.back() == 12345 && std::equal(q.begin(), q.end(), back.begin());
}

TEST(Bands, EveryAlphabetRoundTrips) {
  std::mt19937 random(1);
  for (int i = 0; i < kAlphabets; ++i) {
    const std::int32_t half = half_of(i);
    for (std::size_t count : {1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100}) {
      for (int trial = 0; trial < 20; ++trial) {
        std::vector<std::int32_t> q(count);
        for (auto& value : q) {
          value =
              trial == 0   ? half
              : trial == 1 ? -half
              : trial == 2
                  ? 0
                  : static_cast<std::int32_t>(random() % (2 * static_cast<unsigned>(half) + 1)) -
                        half;
        }
        EXPECT_TRUE(round_trip(q)) << "alphabet " << i << " count " << count;
      }
    }
  }
  EXPECT_TRUE(round_trip({}));
}

TEST(Bands, MixedSizes) {
  std::mt19937 random(2);
  for (int trial = 0; trial < 200; ++trial) {
    std::vector<std::int32_t> q(1 + random() % 400);
    for (std::size_t i = 0; i < q.size(); ++i) {
      const int shift = static_cast<int>((i / 16 * 7 + static_cast<std::size_t>(trial)) % 16);
      q[i] = static_cast<std::int32_t>(random() % (2U << shift)) - (1 << shift) + (shift == 15);
      q[i] = std::clamp(q[i], -kMaxQuantized, kMaxQuantized);
    }
    EXPECT_TRUE(round_trip(q));
  }
}

TEST(Bands, AlphabetsAreTheLeastPerBand) {
  for (std::int32_t max_abs = 0; max_abs <= 300; ++max_abs) {
    std::uint8_t index = 99;
    const std::int32_t q[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -max_abs};
    const std::int64_t bits = choose_alphabets(&index, q, 16);
    int least = 0;
    while (half_of(least) < max_abs) ++least;
    EXPECT_EQ(index, least) << max_abs;
    EXPECT_EQ(bits, band_bits_of(least, 16)) << max_abs;
  }
  // Several bands, the last one short.
  std::mt19937 random(3);
  std::vector<std::int32_t> q(100);
  for (std::size_t i = 0; i < q.size(); ++i) {
    q[i] = static_cast<std::int32_t>(random() % (1U << (i / 8))) -
           static_cast<std::int32_t>(1U << (i / 8)) / 2;
  }
  std::vector<std::uint8_t> index(7);
  std::int64_t want_bits = 0;
  const std::int64_t bits = choose_alphabets(index.data(), q.data(), 100);
  for (std::size_t band = 0; band < 7; ++band) {
    std::int32_t most = 0;
    const std::size_t end = std::min<std::size_t>(100, 16 * band + 16);
    for (std::size_t i = 16 * band; i < end; ++i) most = std::max(most, std::abs(q[i]));
    int least = 0;
    while (half_of(least) < most) ++least;
    EXPECT_EQ(index[band], least);
    want_bits += band_bits_of(least, static_cast<int>(end - 16 * band));
  }
  EXPECT_EQ(bits, want_bits);
}

TEST(Bands, KnownBytes) {
  // Three values of the alphabet of 5: digits 4, 0, 3 = 4 + 0 * 5 + 3 * 25 = 79 in 7 bits.
  const std::int32_t q[] = {2, -2, 1};
  std::uint8_t index[1], stream[16] = {};
  ASSERT_EQ(choose_alphabets(index, q, 3), 7);
  EXPECT_EQ(index[0], 2);
  pack_bands(stream, q, 3, index);
  EXPECT_EQ(stream[0], 79);
  // Two values of 511: 9 bits each, first one lowest.
  const std::int32_t wide[] = {255, -100};
  std::uint8_t packed[16] = {};
  ASSERT_EQ(choose_alphabets(index, wide, 2), 18);
  pack_bands(packed, wide, 2, index);
  EXPECT_EQ(packed[0] | packed[1] << 8 | packed[2] << 16, 510 | 155 << 9);
}

TEST(Bands, NumbersOutOfRangeAreRefused) {
  for (int i = 1; i < kAlphabets; ++i) {
    for (const int count : {1, 3, 8, 16}) {
      const auto index = static_cast<std::uint8_t>(i);
      // All bits set: above a^n - 1, which is never all ones for odd a > 1.
      std::vector<std::uint8_t> stream(64, 0xFF);
      std::vector<std::int32_t> q(16);
      EXPECT_FALSE(unpack_bands(q.data(), stream.data(), count, &index)) << i << " " << count;
      std::fill(stream.begin(), stream.end(), 0);
      EXPECT_TRUE(unpack_bands(q.data(), stream.data(), count, &index));
      EXPECT_EQ(q[0], -half_of(i));
      if (i >= kFirstWideAlphabet) continue;
      // The first number that is one too many.
      const int values = std::min(count, 8);
      std::uint64_t power = 1;
      for (int n = 0; n < values; ++n) power *= kAlphabetSizes[i];
      put_bits(stream.data(), 0, power - 1);
      EXPECT_TRUE(unpack_bands(q.data(), stream.data(), count, &index));
      std::fill(stream.begin(), stream.end(), 0);
      put_bits(stream.data(), 0, power);
      EXPECT_FALSE(unpack_bands(q.data(), stream.data(), count, &index)) << i << " " << count;
    }
  }
}

TEST(Bits, AtEveryPosition) {
  for (int position = 0; position < 40; ++position) {
    for (const int bits : {1, 7, 8, 33, 57}) {
      std::uint8_t stream[24] = {};
      const std::uint64_t value = 0x155AA55AA55AA5A5u & ((std::uint64_t{1} << bits) - 1);
      put_bits(stream, position, value);
      EXPECT_EQ(get_bits(stream, position, bits), value);
      // Bit by bit: nothing else was touched.
      for (int b = 0; b < 24 * 8; ++b) {
        const bool set = (stream[b / 8] >> (b % 8) & 1) != 0;
        const int in = b - position;
        EXPECT_EQ(set, in >= 0 && in < bits && (value >> in & 1) != 0);
      }
    }
  }
}

TEST(StepCode, RoundsDownByLessThanHalfAPercent) {
  std::mt19937 random(4);
  std::uniform_real_distribution<double> exponent(-110, 110);
  for (int i = 0; i < 20000; ++i) {
    const auto step =
        std::clamp(static_cast<float>(std::exp2(exponent(random))), kMinStep, kMaxStep);
    const float value = step_value(step_code(step));
    EXPECT_LE(value, step);
    EXPECT_GT(static_cast<double>(value), static_cast<double>(step) * (1 - 0.004));
    EXPECT_TRUE(is_step_code(step_code(step)));
    EXPECT_EQ(step_code(value), step_code(step));
  }
  EXPECT_EQ(step_value(step_code(1.0F)), 1.0F);
  EXPECT_EQ(step_code(1.0F), 0x7F00);
}

TEST(StepCode, OthersAreNoSteps) {
  int steps = 0;
  for (int code = 0; code < 65536; ++code) {
    const auto c = static_cast<std::uint16_t>(code);
    const float value = step_value(c);
    const bool in_range = value >= kMinStep && value <= kMaxStep;
    EXPECT_EQ(is_step_code(c), in_range) << code;
    steps += in_range;
  }
  EXPECT_EQ(steps, 220 * 256 + 1);
  EXPECT_FALSE(is_step_code(kZeroRowCode));
  EXPECT_FALSE(is_step_code(kWholeRowCode));
}

TEST(Quantize, RoundsHalfToEven) {
  const float r[] = {0.0F, 0.25F, 0.26F, -0.25F, 0.75F, -0.75F, 1.0F, -7.9F, 12.3F};
  std::int32_t q[9];
  ASSERT_TRUE(quantize(q, r, 9, 0.5F));
  const std::int32_t want[] = {0, 0, 1, 0, 2, -2, 2, -16, 25};
  EXPECT_TRUE(std::equal(q, q + 9, want));
}

TEST(Quantize, Limits) {
  std::int32_t q[3];
  const float inf = std::numeric_limits<float>::infinity();
  for (const auto& [value, fits] : {std::pair<float, bool>{32767.0F, true},
                                    {32767.4F, true},
                                    {32767.6F, false},
                                    {40001.0F, false},
                                    {1e30F, false},
                                    {inf, false},
                                    {std::nanf(""), false}}) {
    for (const float sign : {1.0F, -1.0F}) {
      const float r[] = {0.0F, sign * value, 1.0F};
      EXPECT_EQ(quantize(q, r, 3, 1.0F), fits) << r[1];
      if (fits) {
        EXPECT_EQ(q[1], static_cast<std::int32_t>(sign) * 32767);
      }
    }
  }
}

template <class T>
double error_of(const std::vector<float>& x, const std::vector<float>& base,
                const std::vector<std::int32_t>& q, float step) {
  double sum = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    // Two fp32 roundings, then the cast: what a receiver computes.
    const float product = static_cast<float>(q[i]) * step;
    volatile float rebuilt = base[i] + product;
    const auto value = static_cast<double>(to_float(from_float<T>(rebuilt)));
    sum += (static_cast<double>(x[i]) - value) * (static_cast<double>(x[i]) - value);
  }
  return sum;
}

TEST(Errors, EqualDouble) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  for (const std::size_t count : {1, 7, 8, 9, 16, 33, 1000}) {
    std::vector<float> x(count), base(count), r(count);
    std::vector<std::int32_t> q(count);
    for (std::size_t i = 0; i < count; ++i) {
      x[i] = normal(random);
      base[i] = normal(random);
      r[i] = x[i] - base[i];
    }
    const auto n = static_cast<std::int64_t>(count);
    const float step = 0.37F;
    ASSERT_TRUE(quantize(q.data(), r.data(), n, step));
    double norm = 0, rounding = 0;
    for (std::size_t i = 0; i < count; ++i) {
      norm += static_cast<double>(x[i]) * static_cast<double>(x[i]);
      const double scaled = static_cast<double>(r[i]) / static_cast<double>(step);
      rounding += (scaled - std::nearbyint(scaled)) * (scaled - std::nearbyint(scaled));
    }
    EXPECT_NEAR(squared_norm(x.data(), n), norm, 1e-14 * norm);
    EXPECT_NEAR(rounding_error(r.data(), n, step), rounding, 1e-4 * rounding);
    const double f32 = error_of<float>(x, base, q, step),
                 b16 = error_of<Bfloat16>(x, base, q, step);
    EXPECT_NE(f32, b16);
    EXPECT_NEAR(reconstruction_error<float>(x.data(), base.data(), q.data(), n, step), f32,
                1e-13 * f32);
    EXPECT_NEAR(reconstruction_error<Bfloat16>(x.data(), base.data(), q.data(), n, step), b16,
                1e-13 * b16);
  }
  const float bad[] = {1.0F, std::nanf("")},
              huge[] = {1.0F, std::numeric_limits<float>::infinity()};
  EXPECT_TRUE(std::isnan(squared_norm(bad, 2)));
  EXPECT_TRUE(std::isinf(squared_norm(huge, 2)));
}

TEST(SearchStep, KeepsItsBoundAndIsNearTheLargest) {
  std::mt19937 random(6);
  std::normal_distribution<double> normal;
  double sum_lost = 0;
  for (const std::int64_t count : {8, 48, 384, 1024}) {
    for (const double relative : {0.003, 0.05, 0.1, 0.3, 0.7}) {
      for (int trial = 0; trial < 12; ++trial) {
        std::vector<float> r(static_cast<std::size_t>(count));
        const double scale = std::exp2(20 * normal(random));
        for (std::size_t i = 0; i < r.size(); ++i) {
          // White, with a few large ones, and falling off.
          const double shape = trial % 3 == 0   ? 1
                               : trial % 3 == 1 ? (i % 29 == 0 ? 30 : 1)
                                                : 1.0 / (1.0 + static_cast<double>(i));
          r[i] = static_cast<float>(scale * shape * normal(random));
        }
        const double bound = relative * std::sqrt(squared_norm(r.data(), count));
        const auto error = [&](float step) {
          double sum = 0;
          for (const float value : r) {
            const double quotient = static_cast<double>(value) / static_cast<double>(step);
            const double rest = (quotient - std::nearbyint(quotient)) * static_cast<double>(step);
            sum += rest * rest;
          }
          return std::sqrt(sum);
        };
        const float step = search_step(r.data(), count, bound);
        EXPECT_LE(error(step), bound * 1.0001);
        // Up from the step that keeps the bound whatever the values are: the last before the first
        // that breaks it. (Larger ones may keep it by luck; finding those is not asked for.)
        double before = 2 * bound / std::sqrt(static_cast<double>(count));
        while (error(static_cast<float>(before * 1.004)) <= bound) before *= 1.004;
        const double lost = std::log2(before / static_cast<double>(step));
        EXPECT_LT(lost, 0.1);
        if (count >= 384) sum_lost += lost;  // short rows profit from luck
      }
    }
  }
  EXPECT_LT(sum_lost / 120, 0.012);  // bits per element
}

// For each coefficient the 256 salts have every offset (2 k + 1) / 512 - 1/2 once; keys and
// coefficients differ.
TEST(Dither, OffsetsAreEvenlySpacedOverTheSalts) {
  std::set<std::vector<float>> columns;
  for (const std::uint32_t key : {0u, 1u, 0xFFFFFFFFu}) {
    for (const std::uint32_t index : {0u, 1u, 2u, 127u, 4095u}) {
      std::vector<float> offsets;
      for (std::uint32_t salt = 0; salt < 256; ++salt) offsets.push_back(dither(key, index, salt));
      columns.insert(offsets);
      std::sort(offsets.begin(), offsets.end());
      for (int k = 0; k < 256; ++k) {
        EXPECT_EQ(offsets[static_cast<std::size_t>(k)],
                  static_cast<float>((2 * k + 1) / 512.0 - 0.5));
      }
    }
  }
  EXPECT_EQ(columns.size(), 15u);
}

// The error of a dithered coefficient: r - (round(r / step + u) - u) step, whatever r is.
TEST(Dither, QuantizeAndReconstruct) {
  const std::vector<float> r{0.0F, 0.01F, -0.4F, 3.3F, 100.25F, -0.0625F, 1e-20F, 7.0F, 0.5F},
      base(9, 2.0F);
  std::vector<float> offset, x;
  for (std::uint32_t j = 0; j < 9; ++j) {
    offset.push_back(dither(7, j, 33));
    x.push_back(r[j] + base[j]);
  }
  constexpr float kStep = 0.25F;
  std::vector<std::int32_t> q(9);
  ASSERT_TRUE(quantize(q.data(), r.data(), 9, kStep, offset.data()));
  double estimate = 0, exact = 0;
  for (std::size_t j = 0; j < 9; ++j) {
    const double level = std::nearbyint(double{r[j]} / kStep + double{offset[j]});
    EXPECT_EQ(q[j], level);
    const double error = double{r[j]} - (level - double{offset[j]}) * kStep;
    EXPECT_LE(std::abs(error), 0.5 * kStep + 1e-9);
    estimate += error * error / (kStep * kStep);
    const double received = double{base[j]} + (level - double{offset[j]}) * kStep;
    exact += (double{x[j]} - received) * (double{x[j]} - received);
  }
  EXPECT_NEAR(rounding_error(r.data(), 9, kStep, offset.data()), estimate, 1e-4);
  EXPECT_NEAR(reconstruction_error<float>(x.data(), base.data(), q.data(), 9, kStep, offset.data()),
              exact, 1e-5);
  const float step = search_step(r.data(), 9, 1.0, offset.data());
  EXPECT_LE(step * std::sqrt(rounding_error(r.data(), 9, step, offset.data())), 1.0);
}

TEST(SearchStep, Extremes) {
  const std::vector<float> zeros(16, 0.0F), tiny(16, 1e-42F), huge(16, 3e38F);
  for (const auto* r : {&zeros, &tiny, &huge}) {
    for (const double bound :
         {1e-60, 1e-30, 1.0, 1e30, 1e60, std::numeric_limits<double>::infinity()}) {
      const float step = search_step(r->data(), 16, bound);
      EXPECT_GE(step, kMinStep);
      EXPECT_LE(step, kMaxStep);
    }
  }
}

}  // namespace
}  // namespace lshmoe::kernels
