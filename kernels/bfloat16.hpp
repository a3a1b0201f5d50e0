#pragma once
// bfloat16 as its 16 bits. C++17, shared with .cu files.

#include <cstdint>
#include <cstring>

#include "lshmoe/kernels/host_device.hpp"

namespace lshmoe::kernels {

/// The bits of a bfloat16; a type of its own so that it is never taken for an integer.
struct Bfloat16 {
  std::uint16_t bits;
};

LSHMOE_HOST_DEVICE inline std::uint32_t float_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
LSHMOE_HOST_DEVICE inline float float_from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// Round to nearest, ties to even, as torch does; NaN stays NaN, overflow gives Inf.
LSHMOE_HOST_DEVICE inline Bfloat16 to_bfloat16(float value) {
  const std::uint32_t bits = float_bits(value);
  const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  // Selecting instead of branching keeps the loops over it vectorized.
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return Bfloat16{static_cast<std::uint16_t>(is_nan ? ((bits >> 16) | 0x40u) : rounded)};
}
LSHMOE_HOST_DEVICE inline float to_float(Bfloat16 value) {
  return float_from_bits(static_cast<std::uint32_t>(value.bits) << 16);
}
LSHMOE_HOST_DEVICE inline float to_float(float value) { return value; }

/// fp32 -> T, the final cast of every decoder.
template <class T>
LSHMOE_HOST_DEVICE inline T from_float(float value);
template <>
LSHMOE_HOST_DEVICE inline float from_float<float>(float value) {
  return value;
}
template <>
LSHMOE_HOST_DEVICE inline Bfloat16 from_float<Bfloat16>(float value) {
  return to_bfloat16(value);
}

}  // namespace lshmoe::kernels
