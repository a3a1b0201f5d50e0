#pragma once
// Uniform-step quantization of one row, and the search for its step.
//
// What the decoder computes is reconstruct(), shared by both ends; the bound is checked on it.

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "lshmoe/kernels/bfloat16.hpp"
#include "lshmoe/kernels/host_device.hpp"

namespace lshmoe::kernels {

/// Steps outside do not leave the arithmetic room; rows that need one travel whole.
inline constexpr float kMinStep = 0x1p-110F;
inline constexpr float kMaxStep = 0x1p+110F;

/// Value of a quantized coefficient: base + level * step, two roundings, then the cast to T. level:
/// q, or q less its dither, both exact in fp32. Device code must not fuse the two.
template <class T>
LSHMOE_HOST_DEVICE inline T reconstruct(float base, float level, float step) {
#if defined(__CUDA_ARCH__)
  return from_float<T>(__fadd_rn(base, __fmul_rn(level, step)));
#else
  const float product = level * step;
  return from_float<T>(base + product);
#endif
}

// Subtractive dither: both ends know an offset u for every coefficient; q = round(r / step + u)
// comes back as q - u. The error is spread evenly over -1/2 .. 1/2 of a step whatever r is, so the
// mean over many rows is kept, at the error of rounding to nearest (L. Schuchman, 1964).

/// Rows differ in their dither by a salt of one byte.
inline constexpr std::uint32_t kDitherSalts = 256;
/// u of coefficient `index` in the rows of salt `salt`, by `key`. For each coefficient the salts
/// have 256 evenly spaced offsets, whose mean is 0.
LSHMOE_HOST_DEVICE inline float dither(std::uint32_t key, std::uint32_t index, std::uint32_t salt) {
  std::uint32_t h = index * 0x9E3779B9u + key;
  h = (h ^ (h >> 16)) * 0x7FEB352Du;
  h = (h ^ (h >> 15)) * 0x846CA68Bu;
  h ^= h >> 16;
  const std::uint32_t place = ((h | 1u) * (salt ^ ((h >> 8) & 255u)) + (h >> 16)) & 255u;
  return static_cast<float>(static_cast<std::int32_t>(2 * place) - 255) * (1.0F / 512);
}

/// 16 bits for a step: the upper bits of a positive float (8 of exponent, 8 of mantissa), so that
/// neighbors are at most 0.4 % apart. Rounds down. step within kMinStep .. kMaxStep.
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

/// How the rows of one parcel are quantized: their step codes, and their dither, if any.
/// Without a group step: 16 bits, step_code. With one: 8 bits, code k is step * (256 - k) / 256;
/// 254 is a zero row, 255 a whole one.
class StepCode {
 public:
  StepCode() = default;
  /// group_step 0: none.
  LSHMOE_HOST_DEVICE explicit StepCode(float group_step, bool dithered = false,
                                       std::uint32_t dither_key = 0)
      : group_step_(group_step), dither_key_(dither_key), dithered_(dithered) {}

  [[nodiscard]] LSHMOE_HOST_DEVICE bool dithered() const { return dithered_; }
  [[nodiscard]] LSHMOE_HOST_DEVICE std::uint32_t dither_key() const { return dither_key_; }

  [[nodiscard]] LSHMOE_HOST_DEVICE std::size_t bytes() const { return group_step_ > 0 ? 1 : 2; }
  [[nodiscard]] LSHMOE_HOST_DEVICE std::uint16_t zero_row() const {
    return group_step_ > 0 ? std::uint16_t{254} : kZeroRowCode;
  }
  [[nodiscard]] LSHMOE_HOST_DEVICE std::uint16_t whole_row() const {
    return group_step_ > 0 ? std::uint16_t{255} : kWholeRowCode;
  }
  [[nodiscard]] LSHMOE_HOST_DEVICE bool is_step(std::uint16_t code) const {
    return group_step_ > 0 ? code < 254 : is_step_code(code);
  }
  [[nodiscard]] LSHMOE_HOST_DEVICE float value(std::uint16_t code) const {
    return group_step_ > 0 ? group_step_ * (static_cast<float>(256 - code) * (1.0F / 256))
                           : step_value(code);
  }
  /// Largest step not above `step`, or a code that is no step.
  [[nodiscard]] LSHMOE_HOST_DEVICE std::uint16_t below(float step) const {
    if (group_step_ <= 0) {
      if (!(step >= kMinStep)) return zero_row();
      return step_code(step < kMaxStep ? step : kMaxStep);
    }
    const float fraction = step / group_step_;
    const float parts = std::floor((fraction < 1.0F ? fraction : 1.0F) * 256);
    const auto code = static_cast<std::uint16_t>(256 - (parts > 0.0F ? parts : 0.0F));
    if (is_step(code) && value(code) > step) return smaller(code, 1);
    return code < zero_row() ? code : zero_row();
  }
  /// `count` steps smaller, or a code that is no step.
  [[nodiscard]] LSHMOE_HOST_DEVICE std::uint16_t smaller(std::uint16_t code, int count) const {
    if (group_step_ > 0) return static_cast<std::uint16_t>(code + count < 254 ? code + count : 254);
    return code > count ? static_cast<std::uint16_t>(code - count) : kZeroRowCode;
  }

 private:
  float group_step_ = 0;
  std::uint32_t dither_key_ = 0;
  bool dithered_ = false;
};

/// The step that the rows of a group take fractions of, for a common bound; 0: out of range, every
/// row has its own. 2.5 times the step that fits evenly spread values: nearly all rows can use a
/// fraction.
LSHMOE_HOST_DEVICE inline float group_step(double bound, std::int64_t hidden) {
  const double step = 2.5 * bound * std::sqrt(12.0 / static_cast<double>(hidden));
  const bool usable =
      step >= 4 * static_cast<double>(kMinStep) && step <= static_cast<double>(kMaxStep);
  return usable ? step_value(step_code(static_cast<float>(step))) : 0.0F;
}

/// The search for the largest step with an estimated error of at most `bound`: one try after the
/// other, from the step whose error would be `bound` for values uniform in their cells.
class StepSearch {
 public:
  /// Of `count` values.
  LSHMOE_HOST_DEVICE StepSearch(std::int64_t count, double bound)
      : bound_(bound), step_(bound * std::sqrt(12.0 / static_cast<double>(count))) {}

  /// The step to try next.
  [[nodiscard]] LSHMOE_HOST_DEVICE float tried() const {
    return step_value(step_code(usable(step_)));
  }

  /// Takes the rounding_error of tried(). False: the search is over.
  LSHMOE_HOST_DEVICE bool update(float rounding_error) {
    const float step = tried();
    const auto wide = static_cast<double>(step);
    const double error = std::sqrt(static_cast<double>(rounding_error)) * wide;
    if (error <= bound_) {
      best_ = best_ > wide ? best_ : wide;
      below_ = best_;
      if (error >= 0.99 * bound_ || step >= kMaxStep) return false;
    } else {
      above_ = above_ == 0 || wide < above_ ? wide : above_;
      if (step <= kMinStep) return false;
    }
    double next = error > 0 ? wide * bound_ / error : 4 * wide;
    if (error > bound_) next *= 0.998;
    next = next < 4 * wide ? next : 4 * wide;
    if (above_ > 0 && next >= above_) next = below_ > 0 ? 0.5 * (below_ + above_) : 0.97 * above_;
    if (next <= below_) {
      if (above_ > 0 && above_ < 1.01 * below_) return false;
      next = above_ > 0 ? 0.5 * (below_ + above_) : 1.05 * below_;
    }
    step_ = next;
    // Most rows take two or three; those of few large values more.
    return ++tries_ < 10;
  }

  /// The largest step that kept the bound, or a smaller one than all tried.
  [[nodiscard]] LSHMOE_HOST_DEVICE float found() const {
    return usable(best_ > 0 ? best_ : 0.5 * step_);
  }

 private:
  double bound_, step_, best_ = 0;
  double below_ = 0, above_ = 0;  // tightest steps known to keep and to break the bound
  int tries_ = 0;

  LSHMOE_HOST_DEVICE static float usable(double step) {
    if (step < static_cast<double>(kMinStep)) return kMinStep;
    return static_cast<float>(step > static_cast<double>(kMaxStep) ? static_cast<double>(kMaxStep)
                                                                   : step);
  }
};

/// Sum of squares in double, in lanes (lanes.hpp). NaN or Inf in x gives NaN or Inf.
[[nodiscard]] double squared_norm(const float* x, std::int64_t count);

/// Estimate of sum (r - round(r / step) step)^2 / step^2, in fp32.
/// offset, in all four: the dither [count]; null: none.
[[nodiscard]] float rounding_error(const float* r, std::int64_t count, float step,
                                   const float* offset = nullptr);

/// q = round(r / step), ties to even. Returns false, q unspecified, when some |q| > kMaxQuantized.
[[nodiscard]] bool quantize(std::int32_t* q, const float* r, std::int64_t count, float step,
                            const float* offset = nullptr);

/// sum (x - reconstruct<T>(base, q - offset, step))^2 in double: the error the receiver will really
/// see.
template <class T>
[[nodiscard]] double reconstruction_error(const float* x, const float* base, const std::int32_t* q,
                                          std::int64_t count, float step,
                                          const float* offset = nullptr);

/// Largest step found by StepSearch.
[[nodiscard]] float search_step(const float* r, std::int64_t count, double bound,
                                const float* offset = nullptr);

}  // namespace lshmoe::kernels
