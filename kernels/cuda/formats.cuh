#pragma once
// Fixed formats: a warp a row, a block of kFormatBlock elements at a time, four a thread.

#include "lshmoe/kernels/cuda/block.cuh"
#include "lshmoe/kernels/cuda/formats.hpp"
#include "lshmoe/kernels/cuda/row_coder.cuh"

namespace lshmoe::kernels::cuda {

inline constexpr int kPerThread = static_cast<int>(kFormatBlock) / 32;

__device__ inline float warp_max(float value) {
  // By the bits, whose order is that of the magnitudes.
  std::uint32_t bits = float_bits(value) & 0x7FFFFFFFu;
  for (int by = 16; by > 0; by /= 2) {
    const std::uint32_t other = __shfl_xor_sync(kAllLanes, bits, by);
    bits = bits > other ? bits : other;
  }
  return float_from_bits(bits);
}
template <class Real>
__device__ Real warp_sum(Real value) {
  for (int by = 16; by > 0; by /= 2) value += __shfl_xor_sync(kAllLanes, value, by);
  return value;
}

/// Elements lane + 32 k of a block of `count`.
struct FormatBlock {
  float value[kPerThread];
  int lane, count;

  __device__ bool has(int k) const { return lane + 32 * k < count; }
  __device__ float largest() const {
    std::uint32_t bits = 0;
    for (int k = 0; k < kPerThread; ++k) {
      const std::uint32_t size = float_bits(value[k]) & 0x7FFFFFFFu;
      bits = bits > size ? bits : size;
    }
    return warp_max(float_from_bits(bits));
  }
  /// In parts of powers of two, as kernels/cpu/formats.cpp: butterflies from the widest to the
  /// neighbors.
  __device__ void rotate() {
    int part[kPerThread];  // size of the part that the element is in
    for (int k = 0; k < kPerThread; ++k) {
      part[k] = has(k) ? 1 << (31 - __clz((lane + 32 * k) ^ count)) : 0;
    }
    for (int k = 0; k < 2; ++k) {
      if (part[k] > 64) butterfly(k, k + 2);
    }
    for (int k = 0; k < kPerThread; k += 2) {
      if (part[k] > 32) butterfly(k, k + 1);
    }
    for (int by = 16; by > 0; by /= 2) {
      for (int k = 0; k < kPerThread; ++k) {
        const float other = __shfl_xor_sync(kAllLanes, value[k], by);
        if (part[k] > by) value[k] = (lane & by) == 0 ? value[k] + other : other - value[k];
      }
    }
    for (int k = 0; k < kPerThread; ++k) {
      if (has(k)) value[k] *= 1.0F / std::sqrt(static_cast<float>(part[k]));
    }
  }

 private:
  __device__ void butterfly(int low, int high) {
    const float a = value[low], b = value[high];
    value[low] = a + b;
    value[high] = a - b;
  }
};

/// Folded in halves, as kernels/cpu/formats.cpp.
__device__ inline float int4_error(const FormatBlock& unit, float scale) {
  const float inverse = 1.0F / scale;
  float square[kPerThread];
  for (int k = 0; k < kPerThread; ++k) {
    const float error =
        unit.value[k] - format::clamp_int4(nearbyintf(unit.value[k] * inverse)) * scale;
    square[k] = unit.has(k) ? error * error : 0.0F;
  }
  return warp_sum((square[0] + square[2]) + (square[1] + square[3]));
}

__device__ inline float int4_scale(const FormatBlock& z, float largest, bool cuts_nothing) {
  using namespace format;
  if (largest == 0) return 0;
  float top = to_grid(largest / kInt4Max);
  if (cuts_nothing) {
    return top * kInt4Max < largest ? float_from_bits(float_bits(top) + kGrid) : top;
  }
  FormatBlock unit = z;
  for (int k = 0; k < kPerThread; ++k) unit.value[k] = z.value[k] / largest;
  float best = top, best_error = largest_of<float>();
  for (int i = 0; i < kScaleTries; ++i, top *= kScaleRatio) {
    const float scale = to_grid(top);
    const float error = int4_error(unit, scale / largest);
    if (error < best_error) {
      best_error = error;
      best = scale;
    }
  }
  return best;
}

template <class T, RowFormat kFormat, bool kStochastic>
__global__ void encode_format_kernel(std::uint8_t* bytes, const ParcelPlace* places,
                                     std::int64_t count, double* squared, double* error,
                                     RowsOf<T> rows, std::int64_t row_bytes,
                                     std::uint64_t noise_stream) {
  using namespace format;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t warps = std::int64_t{gridDim.x} * (blockDim.x / 32);
  const std::int64_t hidden = rows.hidden;
  for (std::int64_t i = std::int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
       i < rows.rows; i += warps) {
    const ParcelPlace place = places[group_of(places, count, i)];
    std::uint8_t* out = bytes + place.begin + place.head_bytes + (i - place.first) * row_bytes;
    std::uint8_t* codes = out + scale_bytes(kFormat, hidden);
    const T* x = row_at(rows, i);
    NoiseKey key{};
    if (kStochastic) {
      const auto* from = reinterpret_cast<const std::uint8_t*>(x);
      const std::uint8_t* end = from + hidden * static_cast<std::int64_t>(sizeof(T));
      key.low = checksum_by_four([&](std::uint64_t w) { return load_before(from + 8 * w, end); },
                                 static_cast<std::uint64_t>(end - from), noise_stream);
      key.high =
          checksum_by_four([&](std::uint64_t) { return std::uint64_t{key.low}; }, 4, ~noise_stream);
    }
    const auto load = [&](std::int64_t first) {
      FormatBlock block;
      block.lane = lane;
      block.count = static_cast<int>(hidden - first < kFormatBlock ? hidden - first : kFormatBlock);
      for (int k = 0; k < kPerThread; ++k) {
        block.value[k] = block.has(k) ? to_float(x[first + lane + 32 * k]) : 0.0F;
      }
      return block;
    };
    double norm = 0, difference = 0;
    const auto count_error = [&](float value, T decoded) {
      const auto wide = static_cast<double>(value);
      const double d = wide - static_cast<double>(to_float(decoded));
      norm += wide * wide;
      difference += d * d;
    };
    float row_largest = 0;
    if (kFormat == RowFormat::int8) {
      for (std::int64_t first = 0; first < hidden; first += kFormatBlock) {
        const float largest = load(first).largest();
        row_largest = float_bits(largest) > float_bits(row_largest) ? largest : row_largest;
      }
    }
    for (std::int64_t first = 0; first < hidden; first += kFormatBlock) {
      const FormatBlock block = load(first);
      const auto random = [&](int k) {
        return kStochastic ? noise(key, static_cast<std::uint32_t>(first + lane + 32 * k)) : 0;
      };
      if (kFormat != RowFormat::int4) {
        constexpr float kMax = kFormat == RowFormat::fp8 ? kE4m3Max : kInt8Max;
        const float largest = kFormat == RowFormat::fp8 ? block.largest() : row_largest;
        const bool small = largest < kSmallBlock;
        const float down = block_down(small), up = block_up(small), scale = largest * down / kMax;
        const float by = divisor(scale);
        if (lane == 0 && kFormat == RowFormat::fp8) {
          write_scale(out + first / kFormatBlock * 4, scale, small);
        }
        if (lane == 0 && kFormat == RowFormat::int8 && first == 0) write_scale(out, scale, small);
        for (int k = 0; k < kPerThread; ++k) {
          if (!block.has(k)) continue;
          const float scaled = block.value[k] * down / by;
          float value = 0;
          std::uint8_t code = 0;
          if (kFormat == RowFormat::fp8) {
            code = static_cast<std::uint8_t>(to_e4m3<kStochastic>(scaled, random(k)));
            value = e4m3_value(code);
          } else {
            const float q = round_value<kStochastic>(scaled, random(k));
            const float least = -kInt8Max < q ? q : -kInt8Max;
            value = least < kInt8Max ? least : kInt8Max;
            code = static_cast<std::uint8_t>(static_cast<std::int32_t>(value));
          }
          codes[first + lane + 32 * k] = code;
          count_error(block.value[k], from_scaled<T>(value * scale, up));
        }
        continue;
      }
      const bool small = block.largest() < kSmallBlock;
      const float down = block_down(small), up = block_up(small);
      FormatBlock z = block;
      for (int k = 0; k < kPerThread; ++k) z.value[k] *= down;
      z.rotate();
      // The largest coefficient gets the sign that has one code more.
      const float largest = z.largest();
      float found = 0;
      for (int k = 0; k < kPerThread; ++k) found += z.has(k) && z.value[k] == largest ? 1.0F : 0.0F;
      const bool turned = warp_sum(found) > 0;
      const float sign = turned ? -1.0F : 1.0F;
      for (int k = 0; k < kPerThread; ++k) z.value[k] *= sign;
      const float scale = int4_scale(z, largest, kStochastic);
      const float by = divisor(scale);
      if (lane == 0) write_turned_scale(out + first / kFormatBlock * 2, scale, small, turned);
      FormatBlock decoded = z;
      for (int k = 0; k < kPerThread; ++k) {
        const float q = clamp_int4(round_value<kStochastic>(z.value[k] / by, random(k)));
        const std::int32_t code = z.has(k) ? static_cast<std::int32_t>(q) & 15 : 0;
        const std::int32_t next = __shfl_xor_sync(kAllLanes, code, 1);
        if (z.has(k) && lane % 2 == 0) {
          codes[(first + lane + 32 * k) / 2] = static_cast<std::uint8_t>(code | next << 4);
        }
        decoded.value[k] = z.has(k) ? q * (scale * sign) : 0.0F;
      }
      decoded.rotate();
      for (int k = 0; k < kPerThread; ++k) {
        if (block.has(k)) count_error(block.value[k], from_scaled<T>(decoded.value[k], up));
      }
    }
    norm = warp_sum(norm);
    difference = warp_sum(difference);
    if (lane == 0) {
      squared[i] = norm;
      error[i] = std::sqrt(difference);
    }
  }
}

template <class T, RowFormat kFormat>
__global__ void decode_format_kernel(T* out, const std::int64_t* index, std::int64_t out_rows,
                                     std::int64_t* bad, const RawPlace* places, std::int64_t count,
                                     std::int64_t rows, std::int64_t hidden,
                                     std::int64_t row_bytes) {
  using namespace format;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t warps = std::int64_t{gridDim.x} * (blockDim.x / 32);
  for (std::int64_t i = std::int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32; i < rows;
       i += warps) {
    const RawPlace place = places[group_of(places, count, i)];
    const std::uint8_t* in = place.body + (i - place.first) * row_bytes;
    const std::uint8_t* codes = in + scale_bytes(kFormat, hidden);
    const std::int64_t to = index != nullptr ? index[i] : i;
    if (to < 0 || to >= out_rows) continue;
    T* row = out + to * hidden;
    bool good = true;
    for (std::int64_t first = 0; first < hidden; first += kFormatBlock) {
      float scale = 0;
      bool small = false;
      if (kFormat == RowFormat::int4) {
        good &= read_turned_scale(in + first / kFormatBlock * 2, &scale, &small);
      } else {
        good &= read_scale(in + (kFormat == RowFormat::fp8 ? first / kFormatBlock * 4 : 0), &scale,
                           &small);
      }
      FormatBlock block;
      block.lane = lane;
      block.count = static_cast<int>(hidden - first < kFormatBlock ? hidden - first : kFormatBlock);
      for (int k = 0; k < kPerThread; ++k) {
        block.value[k] = 0;
        if (!block.has(k)) continue;
        const std::int64_t j = first + lane + 32 * k;
        if (kFormat == RowFormat::fp8) {
          good &= (codes[j] & 0x7Fu) != 0x7Fu;
          block.value[k] = e4m3_value(codes[j]) * scale;
        } else if (kFormat == RowFormat::int8) {
          const std::int32_t code = static_cast<std::int8_t>(codes[j]);
          good &= code != -128;
          block.value[k] = static_cast<float>(code) * scale;
        } else {
          const int pair = codes[j / 2], nibble = lane % 2 == 0 ? pair & 15 : pair >> 4;
          // With an odd number of elements the last half byte is padding.
          good &= j + 1 < hidden || lane % 2 != 0 || pair >> 4 == 0;
          block.value[k] = static_cast<float>((nibble ^ 8) - 8) * scale;
        }
      }
      if (kFormat == RowFormat::int4) block.rotate();
      const float up = block_up(small);
      for (int k = 0; k < kPerThread; ++k) {
        if (block.has(k)) row[first + lane + 32 * k] = from_scaled<T>(block.value[k], up);
      }
    }
    const float faults = warp_sum(good ? 0.0F : 1.0F);
    if (lane == 0 && faults > 0) {
      atomicMin(reinterpret_cast<long long*>(bad), static_cast<long long>(i));
    }
  }
}

template <int kThreads>
__global__ void encode_bfloat16_kernel(std::uint8_t* bytes, const ParcelPlace* places,
                                       std::int64_t count, double* squared, double* error,
                                       RowsOf<float> rows) {
  for (std::int64_t i = blockIdx.x; i < rows.rows; i += gridDim.x) {
    const ParcelPlace place = places[group_of(places, count, i)];
    std::uint8_t* out =
        bytes + place.begin + place.head_bytes + (i - place.first) * 2 * rows.hidden;
    const float* x = row_at(rows, i);
    double norm = 0, difference = 0;
    for (std::int64_t j = threadIdx.x; j < rows.hidden; j += kThreads) {
      const Bfloat16 value = to_bfloat16(x[j]);
      std::memcpy(out + 2 * j, &value, 2);
      const auto wide = static_cast<double>(x[j]);
      const double d = wide - static_cast<double>(to_float(value));
      norm += wide * wide;
      difference += d * d;
    }
    norm = fold_lanes<kThreads>(norm);
    difference = fold_lanes<kThreads>(difference);
    if (threadIdx.x == 0) {
      // NaN and Inf pass through; they have no relative error.
      const bool finite = norm + difference <= 1.7976931348623157e308;
      squared[i] = finite ? norm : 0;
      error[i] = finite ? std::sqrt(difference) : 0;
    }
  }
}

template <int kThreads>
__global__ void decode_bfloat16_kernel(float* out, const std::int64_t* index, std::int64_t out_rows,
                                       const RawPlace* places, std::int64_t count,
                                       std::int64_t rows, std::int64_t hidden) {
  for (std::int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const RawPlace place = places[group_of(places, count, i)];
    const std::int64_t to = index != nullptr ? index[i] : i;
    if (to < 0 || to >= out_rows) continue;
    const std::uint8_t* from = place.body + (i - place.first) * 2 * hidden;
    for (std::int64_t j = threadIdx.x; j < hidden; j += kThreads) {
      Bfloat16 value;
      std::memcpy(&value, from + 2 * j, 2);
      out[to * hidden + j] = to_float(value);
    }
  }
}

}  // namespace lshmoe::kernels::cuda
