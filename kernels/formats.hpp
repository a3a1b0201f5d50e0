#pragma once
// Rows in fixed formats: fp8, int8, int4. The elements' functors (C++17, shared with .cu files) and
// the loops over rows.
//
// Neither scales nor what is divided by them may overflow or become denormal: a block is first
// multiplied by one of two powers of two (block_down), and the sign bit of its scale says by which.

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "lshmoe/kernels/bfloat16.hpp"
#include "lshmoe/kernels/host_device.hpp"

namespace lshmoe::kernels {

/// Elements that share a scale (fp8, int4), and that are rotated together (int4).
inline constexpr std::int64_t kFormatBlock = 128;

// Integers --------------------------------------------------------------------------------------

/// Nearest integer, ties to even; or stochastic: up with the probability of the part cut off (to
/// 2^-24 of the value). random: 32 bits. |value| < 2^22.
template <bool kStochastic>
LSHMOE_HOST_DEVICE inline float round_value(float value, std::uint32_t random) {
  if (!kStochastic) return std::nearbyint(value);
  // Uniform in -0.5 .. 0.5, both excluded, then nearest.
  const auto centered = static_cast<std::int32_t>(random >> 8) - 0x800000;
  return std::nearbyint(value + (static_cast<float>(centered) + 0.5F) * 0x1p-24F);
}

// e4m3 of the OCP 8-bit floating point specification: no infinities, NaN is 0x7F ----------------

inline constexpr float kE4m3Max = 448.0F;
inline constexpr float kE4m3MinNormal = 0x1p-6F;

/// Nearest, ties to even; beyond +-448 saturates (NaN too). With random bits instead of the half:
/// up with the probability of the part cut off. random: 32 bits.
template <bool kStochastic>
LSHMOE_HOST_DEVICE inline std::uint32_t to_e4m3(float value, std::uint32_t random) {
  const std::uint32_t bits = float_bits(value);
  const std::uint32_t limit = float_bits(kE4m3Max);
  std::uint32_t size = bits & 0x7FFFFFFFu;
  size = size < limit ? size : limit;
  const std::uint32_t add = kStochastic ? random >> 12 : 0x7FFFFu + ((size >> 20) & 1u);
  const std::uint32_t normal = ((size + add) >> 20) - (120u << 3);
  // Below the normal numbers: multiples of 2^-9.
  const float units = float_from_bits(size) * 0x1p+9F;
  const float whole = round_value<kStochastic>(units, random);
  // Clamped: the cast of what is not chosen must be defined too.
  const auto small =
      static_cast<std::uint32_t>(static_cast<std::int32_t>(whole < 8.0F ? whole : 8.0F));
  const std::uint32_t code = size < float_bits(kE4m3MinNormal) ? small : normal;
  return code | ((bits >> 24) & 0x80u);
}
/// Of a code that is not NaN.
LSHMOE_HOST_DEVICE inline float e4m3_value(std::uint32_t code) {
  const std::uint32_t size = code & 0x7Fu;
  // Below the normal numbers: 2^-6 (1 + m / 8) - 2^-6. Without a branch, for the vectorizer.
  const std::uint32_t small = (size - 8u) >> 31;
  const float value = float_from_bits((size << 20) + ((120u + small) << 23)) -
                      float_from_bits((0u - small) & float_bits(kE4m3MinNormal));
  return float_from_bits(float_bits(value) | ((code & 0x80u) << 24));
}

/// Noise of stochastic rounding: 32 bits of (key, element) alone.
struct NoiseKey {
  std::uint32_t low = 0, high = 0;
};
LSHMOE_HOST_DEVICE inline std::uint32_t noise(NoiseKey key, std::uint32_t element) {
  std::uint32_t x = element * 0x9E3779B9u + key.low;
  x = (x ^ (x >> 16)) * 0x7FEB352Du + key.high;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// Scales ----------------------------------------------------------------------------------------

/// Blocks whose largest magnitude is below this are small: their scale's sign bit is set.
inline constexpr float kSmallBlock = 0x1p-64F;
/// What a block is multiplied by before it is coded, and after.
LSHMOE_HOST_DEVICE inline float block_down(bool small) { return small ? 0x1p+80F : 0x1p-16F; }
LSHMOE_HOST_DEVICE inline float block_up(bool small) { return small ? 0x1p-80F : 0x1p+16F; }
/// Scales beyond are never written; up to it no sum of a block leaves fp32.
inline constexpr float kMaxScale = 0x1p+114F;

// Rows ------------------------------------------------------------------------------------------

/// fp8: one fp32 scale a block, largest / 448.  int8: one fp32 scale a row, largest / 127.
/// int4: blocks times a Hadamard matrix / sqrt(n) (the last block in parts of powers of two), one
/// bfloat16 scale a block, two values a byte, in -8 .. 7 times a sign a block.
/// A row is its scales, then its codes.
enum class RowFormat : std::uint8_t { fp8, int8, int4 };

// What both sides compute of a row.
namespace format {
inline constexpr float kInt8Max = 127.0F;
inline constexpr float kInt4Max = 7.0F, kInt4Min = -8.0F;
// Scales tried for a block of int4, each less than the one before: down to two thirds.
inline constexpr int kScaleTries = 12;
inline constexpr float kScaleRatio = 0.96F;

LSHMOE_HOST_DEVICE inline std::int64_t blocks_of(std::int64_t hidden) {
  return (hidden + kFormatBlock - 1) / kFormatBlock;
}

LSHMOE_HOST_DEVICE inline std::size_t scale_bytes(RowFormat format, std::int64_t hidden) {
  switch (format) {
    case RowFormat::fp8:
      return 4 * static_cast<std::size_t>(blocks_of(hidden));
    case RowFormat::int8:
      return 4;
    case RowFormat::int4:
      return 2 * static_cast<std::size_t>(blocks_of(hidden));
  }
  return 0;
}

// What a scale of 0 divides by: there is nothing but zeros to divide.
LSHMOE_HOST_DEVICE inline float divisor(float scale) { return scale > 0 ? scale : 1.0F; }

LSHMOE_HOST_DEVICE inline void write_scale(std::uint8_t* out, float scale, bool small) {
  const float value = small && scale > 0 ? -scale : scale;
  std::memcpy(out, &value, sizeof value);
}
// False for what write_scale never writes.
LSHMOE_HOST_DEVICE inline bool check_scale(float value, float* scale, bool* small) {
  *small = std::signbit(value);
  *scale = std::fabs(value);
  return *scale <= kMaxScale && !(*small && *scale == 0);
}
LSHMOE_HOST_DEVICE inline bool read_scale(const std::uint8_t* in, float* scale, bool* small) {
  float value;
  std::memcpy(&value, in, sizeof value);
  return check_scale(value, scale, small);
}

// int4's: a bfloat16 whose last bit says that the block's codes have the other sign.
inline constexpr std::uint32_t kGrid = 0x20000u;
LSHMOE_HOST_DEVICE inline float to_grid(float value) {
  return float_from_bits((float_bits(value) + kGrid / 2) / kGrid * kGrid);
}
LSHMOE_HOST_DEVICE inline void write_turned_scale(std::uint8_t* out, float scale, bool small,
                                                  bool turned) {
  Bfloat16 value = to_bfloat16(small && scale > 0 ? -scale : scale);
  if (turned && scale > 0) value.bits |= 1u;
  std::memcpy(out, &value, sizeof value);
}
LSHMOE_HOST_DEVICE inline bool read_turned_scale(const std::uint8_t* in, float* scale,
                                                 bool* small) {
  Bfloat16 value;
  std::memcpy(&value, in, sizeof value);
  const bool turned = (value.bits & 1u) != 0;
  value.bits &= 0xFFFEu;
  if (!check_scale(to_float(value), scale, small) || (turned && *scale == 0)) return false;
  if (turned) *scale = -*scale;
  return true;
}

/// Largest finite value of T.
template <class T>
LSHMOE_HOST_DEVICE constexpr float largest_of() {
  return sizeof(T) == 2 ? 0x1.FEp+127F : 0x1.FFFFFEp+127F;
}

// A code near the largest value of T may stand for a little more than it.
template <class T>
LSHMOE_HOST_DEVICE inline T from_scaled(float value, float up) {
  constexpr float kLargest = largest_of<T>();
  const float scaled = value * up;
  const float below = scaled < kLargest ? scaled : kLargest;
  return from_float<T>(below > -kLargest ? below : -kLargest);
}

LSHMOE_HOST_DEVICE inline float clamp_int4(float q) {
  return q < kInt4Min ? kInt4Min : q < kInt4Max ? q : kInt4Max;
}

}  // namespace format

/// Bytes of a row of `hidden` elements.
[[nodiscard]] std::size_t format_row_bytes(RowFormat format, std::int64_t hidden);

/// Writes format_row_bytes to out. x [hidden] finite. key null: nearest, and int4 takes the scale
/// of least error; else stochastic, and scales cut nothing off, so that the mean is x.
void encode_row(RowFormat format, std::uint8_t* out, const float* x, std::int64_t hidden,
                const NoiseKey* key);

/// out [hidden], finite. Returns false, out unspecified, for bytes that encode_row never writes.
template <class T>
[[nodiscard]] bool decode_row(RowFormat format, T* out, const std::uint8_t* in,
                              std::int64_t hidden);

/// x [count], count a power of two up to kFormatBlock, times the Hadamard matrix, not scaled: entry
/// (i, j) is -1 where i & j has an odd number of bits. scratch [count].
void hadamard(float* x, float* scratch, std::int64_t count);

/// sum (a - b)^2 in double.
template <class T>
[[nodiscard]] double squared_distance(const float* a, const T* b, std::int64_t count);

}  // namespace lshmoe::kernels
