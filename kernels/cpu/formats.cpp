#include "lshmoe/kernels/formats.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

#include "lshmoe/kernels/lanes.hpp"

namespace lshmoe::kernels {
namespace {
using namespace format;

// By the bits, whose order is that of the magnitudes.
float largest_magnitude(const float* x, std::int64_t count) {
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, float_bits(x[i]) & 0x7FFFFFFFu);
  }
  return float_from_bits(largest);
}

// fp8 -------------------------------------------------------------------------------------------

template <bool kStochastic>
void encode_fp8(std::uint8_t* out, const float* x, std::int64_t hidden, NoiseKey key) {
  std::uint8_t* codes = out + scale_bytes(RowFormat::fp8, hidden);
  for (std::int64_t first = 0; first < hidden; first += kFormatBlock, out += 4) {
    const std::int64_t count = std::min(kFormatBlock, hidden - first);
    const float largest = largest_magnitude(x + first, count);
    const bool small = largest < kSmallBlock;
    const float down = block_down(small), scale = largest * down / kE4m3Max;
    const float by = divisor(scale);
    write_scale(out, scale, small);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::uint32_t random =
          kStochastic ? noise(key, static_cast<std::uint32_t>(first + i)) : 0;
      codes[first + i] =
          static_cast<std::uint8_t>(to_e4m3<kStochastic>(x[first + i] * down / by, random));
    }
  }
}

template <class T>
bool decode_fp8(T* out, const std::uint8_t* in, std::int64_t hidden) {
  const std::uint8_t* codes = in + scale_bytes(RowFormat::fp8, hidden);
  std::uint32_t bad = 0;
  for (std::int64_t first = 0; first < hidden; first += kFormatBlock, in += 4) {
    const std::int64_t count = std::min(kFormatBlock, hidden - first);
    float scale;
    bool small;
    if (!read_scale(in, &scale, &small)) return false;
    const float up = block_up(small);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::uint32_t code = codes[first + i];
      bad |= (code & 0x7Fu) == 0x7Fu ? 1u : 0u;
      out[first + i] = from_scaled<T>(e4m3_value(code) * scale, up);
    }
  }
  return bad == 0;
}

// int8 ------------------------------------------------------------------------------------------

template <bool kStochastic>
void encode_int8(std::uint8_t* out, const float* x, std::int64_t hidden, NoiseKey key) {
  const float largest = largest_magnitude(x, hidden);
  const bool small = largest < kSmallBlock;
  const float down = block_down(small), scale = largest * down / kInt8Max, by = divisor(scale);
  write_scale(out, scale, small);
  out += 4;
  for (std::int64_t i = 0; i < hidden; ++i) {
    const std::uint32_t random = kStochastic ? noise(key, static_cast<std::uint32_t>(i)) : 0;
    const float q = round_value<kStochastic>(x[i] * down / by, random);
    const float clamped = std::min(std::max(q, -kInt8Max), kInt8Max);
    out[i] = static_cast<std::uint8_t>(static_cast<std::int32_t>(clamped));
  }
}

template <class T>
bool decode_int8(T* out, const std::uint8_t* in, std::int64_t hidden) {
  float scale;
  bool small;
  if (!read_scale(in, &scale, &small)) return false;
  const float up = block_up(small);
  in += 4;
  std::uint32_t bad = 0;
  for (std::int64_t i = 0; i < hidden; ++i) {
    const std::int32_t code = static_cast<std::int8_t>(in[i]);
    bad |= code == -128 ? 1u : 0u;
    out[i] = from_scaled<T>(static_cast<float>(code) * scale, up);
  }
  return bad == 0;
}

// int4 ------------------------------------------------------------------------------------------

// The block in parts of powers of two, the largest first; each orthonormal and its own inverse.
void rotate(float* x, float* scratch, std::int64_t count) {
  for (std::int64_t part = kFormatBlock; count > 0; part /= 2) {
    if (part > count) continue;
    hadamard(x, scratch, part);
    const float norm = 1.0F / std::sqrt(static_cast<float>(part));
    for (std::int64_t i = 0; i < part; ++i) x[i] *= norm;
    x += part;
    count -= part;
  }
}

// Sum of squared errors at a scale, folded in halves.
float int4_error(const float* z, float scale, std::int64_t count) {
  const float inverse = 1.0F / scale;
  float square[kFormatBlock] = {};
  for (std::int64_t i = 0; i < count; ++i) {
    const float error = z[i] - clamp_int4(std::nearbyint(z[i] * inverse)) * scale;
    square[i] = error * error;
  }
  for (std::int64_t half = kFormatBlock / 2; half > 0; half /= 2) {
    for (std::int64_t j = 0; j < half; ++j) square[j] += square[j + half];
  }
  return square[0];
}

// Of coefficients of this largest magnitude. A cut at the ends may cost less than coarse steps.
float int4_scale(const float* z, float largest, std::int64_t count, bool cuts_nothing) {
  if (largest == 0) return 0;
  float top = to_grid(largest / kInt4Max);
  if (cuts_nothing) {
    return top * kInt4Max < largest ? float_from_bits(float_bits(top) + kGrid) : top;
  }
  // Errors relative to the largest, so that their squares stay within fp32.
  float unit[kFormatBlock];
  for (std::int64_t i = 0; i < count; ++i) unit[i] = z[i] / largest;
  float best = top, best_error = std::numeric_limits<float>::max();
  for (int i = 0; i < kScaleTries; ++i, top *= kScaleRatio) {
    const float scale = to_grid(top);
    const float error = int4_error(unit, scale / largest, count);
    if (error < best_error) {
      best_error = error;
      best = scale;
    }
  }
  return best;
}

template <bool kStochastic>
void encode_int4(std::uint8_t* out, const float* x, std::int64_t hidden, NoiseKey key) {
  std::uint8_t* codes = out + scale_bytes(RowFormat::int4, hidden);
  float z[kFormatBlock], scratch[kFormatBlock];
  std::uint8_t q[kFormatBlock];
  for (std::int64_t first = 0; first < hidden; first += kFormatBlock, out += 2) {
    const std::int64_t count = std::min(kFormatBlock, hidden - first);
    const bool small = largest_magnitude(x + first, count) < kSmallBlock;
    const float down = block_down(small);
    for (std::int64_t i = 0; i < count; ++i) z[i] = x[first + i] * down;
    rotate(z, scratch, count);
    // The largest coefficient gets the sign that has one code more.
    const float largest = largest_magnitude(z, count);
    std::uint32_t found = 0;
    for (std::int64_t i = 0; i < count; ++i) found |= z[i] == largest ? 1u : 0u;
    const bool turned = found != 0;
    const float sign = turned ? -1.0F : 1.0F;
    for (std::int64_t i = 0; i < count; ++i) z[i] *= sign;
    const float scale = int4_scale(z, largest, count, kStochastic);
    const float by = divisor(scale);
    write_turned_scale(out, scale, small, turned);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::uint32_t random =
          kStochastic ? noise(key, static_cast<std::uint32_t>(first + i)) : 0;
      const float code = clamp_int4(round_value<kStochastic>(z[i] / by, random));
      q[i] = static_cast<std::uint8_t>(static_cast<std::int32_t>(code) & 15);
    }
    if (count % 2 != 0) q[count] = 0;
    for (std::int64_t i = 0; i < (count + 1) / 2; ++i) {
      codes[i] = static_cast<std::uint8_t>(q[2 * i] | q[2 * i + 1] << 4);
    }
    codes += (count + 1) / 2;
  }
}

template <class T>
bool decode_int4(T* out, const std::uint8_t* in, std::int64_t hidden) {
  const std::uint8_t* codes = in + scale_bytes(RowFormat::int4, hidden);
  float z[kFormatBlock], scratch[kFormatBlock];
  for (std::int64_t first = 0; first < hidden; first += kFormatBlock, in += 2) {
    const std::int64_t count = std::min(kFormatBlock, hidden - first);
    float scale;
    bool small;
    if (!read_turned_scale(in, &scale, &small)) return false;
    for (std::int64_t i = 0; i < count / 2; ++i) {
      z[2 * i] = static_cast<float>(((codes[i] & 15) ^ 8) - 8) * scale;
      z[2 * i + 1] = static_cast<float>(((codes[i] >> 4) ^ 8) - 8) * scale;
    }
    codes += count / 2;
    if (count % 2 != 0) {
      if (*codes >> 4 != 0) return false;
      z[count - 1] = static_cast<float>((*codes++ ^ 8) - 8) * scale;
    }
    rotate(z, scratch, count);
    const float up = block_up(small);
    for (std::int64_t i = 0; i < count; ++i) out[first + i] = from_scaled<T>(z[i], up);
  }
  return true;
}

}  // namespace

// Stages of one shape (halves in, neighbors out): each vectorizes, whatever the distance of the
// butterfly would be.
void hadamard(float* x, float* scratch, std::int64_t count) {
  float *from = x, *to = scratch;
  const std::int64_t half = count / 2;
  for (std::int64_t stage = 1; stage < count; stage *= 2) {
    for (std::int64_t i = 0; i < half; ++i) {
      const float a = from[i], b = from[i + half];
      to[2 * i] = a + b;
      to[2 * i + 1] = a - b;
    }
    std::swap(from, to);
  }
  if (from != x) std::copy_n(from, count, x);
}

std::size_t format_row_bytes(RowFormat format, std::int64_t hidden) {
  const std::int64_t codes = format == RowFormat::int4 ? (hidden + 1) / 2 : hidden;
  return scale_bytes(format, hidden) + static_cast<std::size_t>(codes);
}

void encode_row(RowFormat format, std::uint8_t* out, const float* x, std::int64_t hidden,
                const NoiseKey* key) {
  const bool stochastic = key != nullptr;
  const NoiseKey k = stochastic ? *key : NoiseKey{};
  switch (format) {
    case RowFormat::fp8:
      return stochastic ? encode_fp8<true>(out, x, hidden, k)
                        : encode_fp8<false>(out, x, hidden, k);
    case RowFormat::int8:
      return stochastic ? encode_int8<true>(out, x, hidden, k)
                        : encode_int8<false>(out, x, hidden, k);
    case RowFormat::int4:
      return stochastic ? encode_int4<true>(out, x, hidden, k)
                        : encode_int4<false>(out, x, hidden, k);
  }
}

template <class T>
bool decode_row(RowFormat format, T* out, const std::uint8_t* in, std::int64_t hidden) {
  switch (format) {
    case RowFormat::fp8:
      return decode_fp8(out, in, hidden);
    case RowFormat::int8:
      return decode_int8(out, in, hidden);
    case RowFormat::int4:
      return decode_int4(out, in, hidden);
  }
  return false;
}

template <class T>
double squared_distance(const float* a, const T* b, std::int64_t count) {
  return lane_sum<double>(count, [=](std::int64_t i) {
    const double d = static_cast<double>(a[i]) - static_cast<double>(to_float(b[i]));
    return d * d;
  });
}

template bool decode_row<float>(RowFormat, float*, const std::uint8_t*, std::int64_t);
template bool decode_row<Bfloat16>(RowFormat, Bfloat16*, const std::uint8_t*, std::int64_t);
template double squared_distance<float>(const float*, const float*, std::int64_t);
template double squared_distance<Bfloat16>(const float*, const Bfloat16*, std::int64_t);

}  // namespace lshmoe::kernels
