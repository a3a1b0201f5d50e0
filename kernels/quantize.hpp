#pragma once
// Uniform-step quantisation of one row, and the search for its step.
//
// What the decoder computes is reconstruct(), shared by both ends; the bound is checked on it.

#include <cstdint>

#include "lshmoe/kernels/bfloat16.hpp"
#include "lshmoe/kernels/host_device.hpp"

namespace lshmoe::kernels {

/// Steps outside do not leave the arithmetic room; rows that need one travel whole.
inline constexpr float kMinStep = 0x1p-110F;
inline constexpr float kMaxStep = 0x1p+110F;

/// Value of a quantised coefficient: base + q * step, two roundings, then the cast to T.
/// Device code must not fuse the two.
template <class T>
LSHMOE_HOST_DEVICE inline T reconstruct(float base, std::int32_t q, float step) {
#if defined(__CUDA_ARCH__)
  return from_float<T>(__fadd_rn(base, __fmul_rn(static_cast<float>(q), step)));
#else
  const float product = static_cast<float>(q) * step;
  return from_float<T>(base + product);
#endif
}

/// 16 bits for a step: the upper bits of a positive float (8 of exponent, 8 of mantissa), so that
/// neighbours are at most 0.4 % apart. Rounds down. step within kMinStep .. kMaxStep.
LSHMOE_HOST_DEVICE inline std::uint16_t step_code(float step) {
  return static_cast<std::uint16_t>(float_bits(step) >> 15);
}
LSHMOE_HOST_DEVICE inline float step_value(std::uint16_t code) {
  return float_from_bits(static_cast<std::uint32_t>(code) << 15);
}
/// Codes that are no step.
inline constexpr std::uint16_t kZeroRowCode = 0;
inline constexpr std::uint16_t kWholeRowCode = 0xFFFF;
/// True for codes of steps within kMinStep .. kMaxStep.
LSHMOE_HOST_DEVICE inline bool is_step_code(std::uint16_t code) {
  return code >= (float_bits(kMinStep) >> 15) && code <= (float_bits(kMaxStep) >> 15);
}

/// Sum of squares in double, in eight interleaved partial sums. NaN or Inf in x gives NaN or Inf.
[[nodiscard]] double squared_norm(const float* x, std::int64_t count);

/// Estimate of sum (r - round(r / step) step)^2 / step^2, in fp32.
/// offset, in all three: null, or [count] within -0.5 .. 0.5, added to r / step before it is
/// rounded; evenly spread offsets make stochastic rounding.
[[nodiscard]] float rounding_error(const float* r, std::int64_t count, float step,
                                   const float* offset = nullptr);

/// q = round(r / step), ties to even. Returns false, q unspecified, when some |q| > kMaxQuantised.
[[nodiscard]] bool quantize(std::int32_t* q, const float* r, std::int64_t count, float step,
                            const float* offset = nullptr);

/// sum (x - reconstruct<T>(base, q, step))^2 in double: the error the receiver will really see.
template <class T>
[[nodiscard]] double reconstruction_error(const float* x, const float* base, const std::int32_t* q,
                                          std::int64_t count, float step);

/// Largest step found with an estimated error of at most `bound`, in a bounded number of tries;
/// starts from the step whose error would be `bound` for values uniform in their cells.
[[nodiscard]] float search_step(const float* r, std::int64_t count, double bound,
                                const float* offset = nullptr);

}  // namespace lshmoe::kernels
