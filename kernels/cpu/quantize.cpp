#include "lshmoe/kernels/quantize.hpp"

#include <algorithm>
#include <cmath>

#include "lshmoe/kernels/bands.hpp"
#include "lshmoe/kernels/lanes.hpp"

namespace lshmoe::kernels {
double squared_norm(const float* x, std::int64_t count) {
  return lane_sum<double>(count, [x](std::int64_t i) {
    const auto value = static_cast<double>(x[i]);
    return value * value;
  });
}

namespace {
/// The value that is rounded, in steps.
template <bool kOffset>
float shifted(float scaled, const float* offset, std::int64_t i) {
  return kOffset ? scaled + offset[i] : scaled;
}

template <bool kOffset>
float sum_rounding_error(const float* r, std::int64_t count, float step, const float* offset) {
  const float inverse = 1.0F / step;
  return lane_sum<float>(count, [=](std::int64_t i) {
    const float value = shifted<kOffset>(r[i] * inverse, offset, i);
    const float error = value - std::nearbyintf(value);
    return error * error;
  });
}

template <bool kOffset>
bool quantize_all(std::int32_t* q, const float* r, std::int64_t count, float step,
                  const float* offset) {
  const float inverse = 1.0F / step;
  std::int32_t beyond = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    // Clamped so that the cast is defined (in this order NaN becomes a limit); the clamped ones are
    // reported.
    const float scaled = std::nearbyintf(shifted<kOffset>(r[i] * inverse, offset, i));
    q[i] = static_cast<std::int32_t>(std::max(-40000.0F, std::min(40000.0F, scaled)));
    beyond |= static_cast<std::int32_t>(q[i] > kMaxQuantized) |
              static_cast<std::int32_t>(q[i] < -kMaxQuantized);
  }
  return beyond == 0;
}
}  // namespace

float rounding_error(const float* r, std::int64_t count, float step, const float* offset) {
  return offset != nullptr ? sum_rounding_error<true>(r, count, step, offset)
                           : sum_rounding_error<false>(r, count, step, nullptr);
}

bool quantize(std::int32_t* q, const float* r, std::int64_t count, float step,
              const float* offset) {
  return offset != nullptr ? quantize_all<true>(q, r, count, step, offset)
                           : quantize_all<false>(q, r, count, step, nullptr);
}

namespace {
template <class T, bool kOffset, int kLanes>
double sum_reconstruction_error(const float* x, const float* base, const std::int32_t* q,
                                std::int64_t count, float step, const float* offset) {
  // What the receiver has, then how far it is off: two loops that vectorize.
  constexpr std::int64_t kBlock = 256;
  float received[kBlock];
  LaneSum<double, kLanes> sum;
  for (std::int64_t first = 0; first < count; first += kBlock) {
    const std::int64_t block = std::min(kBlock, count - first);
    for (std::int64_t j = 0; j < block; ++j) {
      const auto level = static_cast<float>(q[first + j]);
      received[j] = to_float(
          reconstruct<T>(base[first + j], kOffset ? level - offset[first + j] : level, step));
    }
    sum.add(block, [&](std::int64_t j) {
      const double error = static_cast<double>(x[first + j]) - static_cast<double>(received[j]);
      return error * error;
    });
  }
  return sum.folded();
}

template <class T, bool kOffset>
double sum_reconstruction_error(const float* x, const float* base, const std::int32_t* q,
                                std::int64_t count, float step, const float* offset) {
  return lanes_of(count) == kFewLanes
             ? sum_reconstruction_error<T, kOffset, kFewLanes>(x, base, q, count, step, offset)
             : sum_reconstruction_error<T, kOffset, kManyLanes>(x, base, q, count, step, offset);
}
}  // namespace

template <class T>
double reconstruction_error(const float* x, const float* base, const std::int32_t* q,
                            std::int64_t count, float step, const float* offset) {
  return offset != nullptr ? sum_reconstruction_error<T, true>(x, base, q, count, step, offset)
                           : sum_reconstruction_error<T, false>(x, base, q, count, step, nullptr);
}
template double reconstruction_error<float>(const float*, const float*, const std::int32_t*,
                                            std::int64_t, float, const float*);
template double reconstruction_error<Bfloat16>(const float*, const float*, const std::int32_t*,
                                               std::int64_t, float, const float*);

float search_step(const float* r, std::int64_t count, double bound, const float* offset) {
  StepSearch search(count, bound);
  while (search.update(rounding_error(r, count, search.tried(), offset))) {
  }
  return search.found();
}

}  // namespace lshmoe::kernels
