#include "lshmoe/kernels/quantize.hpp"

#include <algorithm>
#include <cmath>

#include "lshmoe/kernels/bands.hpp"

namespace lshmoe::kernels {
namespace {
constexpr int kLanes = 8;

template <class Real>
Real sum_lanes(const Real* lane) {
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}
}  // namespace

double squared_norm(const float* x, std::int64_t count) {
  double lane[kLanes] = {};
  const std::int64_t full = count - count % kLanes;
  for (std::int64_t i = 0; i < full; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const auto value = static_cast<double>(x[i + j]);
      lane[j] += value * value;
    }
  }
  for (std::int64_t i = full; i < count; ++i) {
    lane[i - full] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  }
  return sum_lanes(lane);
}

namespace {
template <bool kOffset>
float rounded(float scaled, const float* offset, std::int64_t i) {
  return std::nearbyintf(kOffset ? scaled + offset[i] : scaled);
}

template <bool kOffset>
float sum_rounding_error(const float* r, std::int64_t count, float step, const float* offset) {
  const float inverse = 1.0F / step;
  float lane[2 * kLanes] = {};
  const std::int64_t full = count - count % (2 * kLanes);
  for (std::int64_t i = 0; i < full; i += 2 * kLanes) {
    for (int j = 0; j < 2 * kLanes; ++j) {
      const float scaled = r[i + j] * inverse;
      const float error = scaled - rounded<kOffset>(scaled, offset, i + j);
      lane[j] += error * error;
    }
  }
  for (std::int64_t i = full; i < count; ++i) {
    const float scaled = r[i] * inverse;
    const float error = scaled - rounded<kOffset>(scaled, offset, i);
    lane[i - full] += error * error;
  }
  return sum_lanes(lane) + sum_lanes(lane + kLanes);
}

template <bool kOffset>
bool quantize_all(std::int32_t* q, const float* r, std::int64_t count, float step,
                  const float* offset) {
  const float inverse = 1.0F / step;
  std::int32_t beyond = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    // Clamped so that the cast is defined (in this order NaN becomes a limit); the clamped ones are
    // reported.
    const float scaled = rounded<kOffset>(r[i] * inverse, offset, i);
    q[i] = static_cast<std::int32_t>(std::max(-40000.0F, std::min(40000.0F, scaled)));
    beyond |= static_cast<std::int32_t>(q[i] > kMaxQuantised) |
              static_cast<std::int32_t>(q[i] < -kMaxQuantised);
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

template <class T>
double reconstruction_error(const float* x, const float* base, const std::int32_t* q,
                            std::int64_t count, float step) {
  double lane[kLanes] = {};
  // Values first, differences then: in one loop the 16-bit values halve the vectors.
  constexpr std::int64_t kBlock = 128;
  float value[kBlock];
  for (std::int64_t first = 0; first < count; first += kBlock) {
    const std::int64_t block = std::min(kBlock, count - first);
    for (std::int64_t i = 0; i < block; ++i) {
      value[i] = to_float(reconstruct<T>(base[first + i], q[first + i], step));
    }
    const auto add = [&](std::int64_t i, int j) {
      const double error = static_cast<double>(x[first + i]) - static_cast<double>(value[i]);
      lane[j] += error * error;
    };
    const std::int64_t full = block - block % kLanes;
    for (std::int64_t i = 0; i < full; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) add(i + j, j);
    }
    for (std::int64_t i = full; i < block; ++i) add(i, static_cast<int>(i - full));
  }
  return sum_lanes(lane);
}
template double reconstruction_error<float>(const float*, const float*, const std::int32_t*,
                                            std::int64_t, float);
template double reconstruction_error<Bfloat16>(const float*, const float*, const std::int32_t*,
                                               std::int64_t, float);

float search_step(const float* r, std::int64_t count, double bound, const float* offset) {
  const auto usable = [](double step) {
    return static_cast<float>(
        std::clamp(step, static_cast<double>(kMinStep), static_cast<double>(kMaxStep)));
  };
  double step = bound * std::sqrt((offset != nullptr ? 6.0 : 12.0) / static_cast<double>(count));
  double best = 0;
  double below = 0, above = 0;  // tightest steps known to keep and to break the bound
  // Most rows take two or three; those of few large values more.
  for (int attempt = 0; attempt < 10; ++attempt) {
    const float tried = step_value(step_code(usable(step)));
    const double error = std::sqrt(static_cast<double>(rounding_error(r, count, tried, offset))) *
                         static_cast<double>(tried);
    if (error <= bound) {
      best = std::max(best, static_cast<double>(tried));
      below = best;
      if (error >= 0.99 * bound || tried >= kMaxStep) break;
    } else {
      above = above == 0 ? static_cast<double>(tried) : std::min(above, static_cast<double>(tried));
      if (tried <= kMinStep) break;
    }
    double next =
        error > 0 ? static_cast<double>(tried) * bound / error : 4 * static_cast<double>(tried);
    if (error > bound) next *= 0.998;
    next = std::min(next, 4 * static_cast<double>(tried));
    if (above > 0 && next >= above) next = below > 0 ? 0.5 * (below + above) : 0.97 * above;
    if (next <= below) {
      if (above > 0 && above < 1.01 * below) break;
      next = above > 0 ? 0.5 * (below + above) : 1.05 * below;
    }
    step = next;
  }
  return best > 0 ? usable(best) : usable(0.5 * step);
}

}  // namespace lshmoe::kernels
