#pragma once
// Rows within a hard bound: search of the step, quantization, bands, packing and back. The
// arithmetic of compress/row_coder.cpp.

#include "lshmoe/kernels/bands.hpp"
#include "lshmoe/kernels/cuda/block.cuh"
#include "lshmoe/kernels/cuda/row_coder.hpp"
#include "lshmoe/kernels/formats.hpp"
#include "lshmoe/kernels/quantize.hpp"
#include "lshmoe/kernels/reference_norm.hpp"

namespace lshmoe::kernels::cuda {

template <class T>
__device__ const T* row_at(const RowsOf<T>& rows, std::int64_t i) {
  if (rows.index == nullptr) return rows.x + i * rows.hidden;
  std::int64_t row = rows.index[i];
  row = row < 0 ? 0 : row < rows.tokens ? row : rows.tokens - 1;
  return rows.x + row * rows.hidden;
}

template <class T, int kThreads>
__global__ void squared_norms_kernel(double* squared, RowsOf<T> rows) {
  for (std::int64_t i = blockIdx.x; i < rows.rows; i += gridDim.x) {
    const T* x = row_at(rows, i);
    const double sum = block_lane_sum<double, kThreads>(rows.hidden, [x](std::int64_t j) {
      const auto value = static_cast<double>(to_float(x[j]));
      return value * value;
    });
    if (threadIdx.x == 0) squared[i] = sum;
  }
}

/// A block a row.
template <class T, int kThreads>
__global__ void widen_rows_kernel(float* out, RowsOf<T> rows, std::int64_t first,
                                  std::int64_t count) {
  for (std::int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const T* x = row_at(rows, first + i);
    for (std::int64_t j = threadIdx.x; j < rows.hidden; j += kThreads) {
      out[i * rows.hidden + j] = to_float(x[j]);
    }
  }
}

/// One block.
template <int kThreads>
__global__ void norm_cap_kernel(double* cap, const double* squared, const std::int64_t* number,
                                std::int64_t rows, std::int64_t numbers) {
  __shared__ std::int32_t count[kNormBins];
  __shared__ int median;
  for (int bin = static_cast<int>(threadIdx.x); bin < kNormBins; bin += kThreads) count[bin] = 0;
  if (threadIdx.x == 0) median = -1;
  __syncthreads();
  for (std::int64_t i = threadIdx.x; i < rows; i += kThreads) {
    std::int64_t row = number != nullptr ? number[i] : i;
    row = row < 0 ? 0 : row < numbers ? row : numbers - 1;
    const int bin = norm_bin(squared[row]);
    if (bin >= 0) atomicAdd(&count[bin], 1);
  }
  __syncthreads();
  // Each thread has neighboring bins.
  constexpr int kOwn = (kNormBins + kThreads - 1) / kThreads;
  const int first = static_cast<int>(threadIdx.x) * kOwn;
  std::int32_t mine = 0, all = 0;
  for (int bin = first; bin < first + kOwn && bin < kNormBins; ++bin) mine += count[bin];
  std::int64_t below = exclusive_sum<kThreads>(mine, &all);
  for (int bin = first; bin < first + kOwn && bin < kNormBins; ++bin) {
    const bool before = 2 * below >= all;
    below += count[bin];
    if (!before && 2 * below >= all) median = bin;
  }
  __syncthreads();
  if (threadIdx.x == 0) *cap = norm_cap(median);
}

/// Sums over the rows of a group.
struct GroupEnergy {
  double squares = 0, rows = 0;  // of references; that are not zero
};
template <int kThreads>
__device__ GroupEnergy group_energy(const double* squared, std::int64_t rows, double cap) {
  const double squares = block_lane_sum<double, kThreads>(rows, [=](std::int64_t i) {
    const double reference = reference_norm(std::sqrt(squared[i]), cap);
    return reference * reference;
  });
  return {squares, block_lane_sum<double, kThreads>(
                       rows, [=](std::int64_t i) { return squared[i] > 0 ? 1.0 : 0.0; })};
}
/// A block a group.
template <int kThreads>
__global__ void row_bounds_kernel(double* bound, CodedGroup* groups, std::int64_t group_count,
                                  const double* squared, const double* cap_at, double max_error,
                                  bool by_group, std::int64_t hidden) {
  const double cap = cap_at != nullptr ? *cap_at : norm_cap(-1);
  for (std::int64_t g = blockIdx.x; g < group_count; g += gridDim.x) {
    const std::int64_t first = groups[g].first, rows = groups[g].rows;
    double group_bound = 0;
    if (by_group) {
      // lane_sum has few lanes for few rows: the other threads add zeros.
      GroupEnergy energy;
      if (lanes_of(rows) == kManyLanes) {
        energy = group_energy<kManyLanes>(squared + first, rows, cap);
      } else {
        __shared__ double squares, counted;
        if (threadIdx.x < kFewLanes) {
          energy = group_energy<kFewLanes>(squared + first, rows, cap);
          if (threadIdx.x == 0) {
            squares = energy.squares;
            counted = energy.rows;
          }
        }
        __syncthreads();
        energy = {squares, counted};
        __syncthreads();
      }
      if (energy.rows > 0) group_bound = max_error * std::sqrt(energy.squares / energy.rows);
      if (threadIdx.x == 0) groups[g].step = group_step(group_bound, hidden);
    }
    for (std::int64_t i = first + threadIdx.x; i < first + rows; i += blockDim.x) {
      bound[i] = by_group ? group_bound : max_error * reference_norm(std::sqrt(squared[i]), cap);
    }
  }
}

/// One row in shared memory, by a block of kThreads = lanes_of(hidden) threads.
template <class T, int kThreads>
struct BlockRow {
  std::int64_t hidden, bands;
  float* x;             // [hidden] in coding order
  float* r;             // [bands * 16] residual, zeros behind the last
  std::uint8_t* index;  // [bands]
  StepCode steps;
  std::uint32_t salt = 0;  // of the dither

  /// Bytes of shared memory that a row takes.
  static std::size_t shared_bytes(std::int64_t hidden) {
    const std::int64_t bands = (hidden + kBandValues - 1) / kBandValues;
    return static_cast<std::size_t>(2 * 4 * bands * kBandValues + (bands + 16) / 16 * 16);
  }

  __device__ explicit BlockRow(std::int64_t size)
      : hidden(size), bands((size + kBandValues - 1) / kBandValues) {
    x = reinterpret_cast<float*>(dynamic_shared());
    r = x + bands * kBandValues;
    index = reinterpret_cast<std::uint8_t*>(r + bands * kBandValues);
  }

  /// The row in coding order; then its residual.
  __device__ void load(const T* from, const CodedGroup& group, const float* base) {
    __syncthreads();  // the row before may still be read
    const std::int32_t* place = group.place;
    for (std::int64_t j = threadIdx.x; j < hidden; j += kThreads) {
      x[place != nullptr ? place[j] : j] = to_float(from[j]);
    }
    __syncthreads();
    for (std::int64_t j = threadIdx.x; j < bands * kBandValues; j += kThreads) {
      r[j] = j < hidden ? x[j] - (base != nullptr ? base[j] : 0.0F) : 0.0F;
    }
    __syncthreads();
  }

  /// Coefficients of a row: what is coded, less nothing.
  __device__ void load_coefficients(const float* from) {
    __syncthreads();  // the row before may still be read
    for (std::int64_t j = threadIdx.x; j < bands * kBandValues; j += kThreads) {
      r[j] = j < hidden ? from[j] : 0.0F;
      if (j < hidden) x[j] = from[j];
    }
    __syncthreads();
  }

  /// The salt of a row: equal rows get equal bytes.
  __device__ void set_salt(const T* from) {
    const auto natural = [&](std::uint64_t j) {
      return std::uint64_t{float_bits(to_float(from[j]))};
    };
    const auto count = static_cast<std::uint64_t>(hidden);
    salt = checksum_by_four(
               [&](std::uint64_t w) {
                 return natural(2 * w) | (2 * w + 1 < count ? natural(2 * w + 1) << 32 : 0);
               },
               4 * count, steps.dither_key()) %
           kDitherSalts;
  }

  __device__ float offset(std::int64_t j) const {
    return dither(steps.dither_key(), static_cast<std::uint32_t>(j), salt);
  }
  /// The value that is rounded, in steps.
  __device__ float shifted(std::int64_t j, float inverse) const {
    const float scaled = r[j] * inverse;
    return steps.dithered() ? scaled + offset(j) : scaled;
  }
  __device__ std::int32_t quantized(std::int64_t j, float inverse) const {
    const float scaled = nearbyintf(shifted(j, inverse));
    // In this order NaN becomes a limit.
    const float low = scaled < 40000.0F ? scaled : 40000.0F;
    return static_cast<std::int32_t>(low > -40000.0F ? low : -40000.0F);
  }

  __device__ double residual_norm() const {
    return std::sqrt(block_lane_sum<double, kThreads>(hidden, [this](std::int64_t j) {
      const auto value = static_cast<double>(r[j]);
      return value * value;
    }));
  }
  __device__ float rounding_error(float step) const {
    const float inverse = 1.0F / step;
    return block_lane_sum<float, kThreads>(hidden, [this, inverse](std::int64_t j) {
      const float value = shifted(j, inverse);
      const float error = value - nearbyintf(value);
      return error * error;
    });
  }
  __device__ float search_step(double bound) const {
    StepSearch search(hidden, bound);
    while (search.update(rounding_error(search.tried()))) {
    }
    return search.found();
  }
  /// The error that the receiver sees; -1: a value is beyond what can be packed. all_zero: for q =
  /// 0. Received: T, or float where values are coefficients.
  template <class Received>
  __device__ double true_error(const float* base, float step, bool all_zero) const {
    const float inverse = 1.0F / step;
    bool beyond = false;
    const double sum = block_lane_sum<double, kThreads>(hidden, [&](std::int64_t j) {
      const std::int32_t q = all_zero ? 0 : quantized(j, inverse);
      beyond |= q > kMaxQuantized || q < -kMaxQuantized;
      const auto whole = static_cast<float>(q);
      const float value = to_float(reconstruct<Received>(
          base != nullptr ? base[j] : 0.0F, steps.dithered() ? whole - offset(j) : whole, step));
      const double error = static_cast<double>(x[j]) - static_cast<double>(value);
      return error * error;
    });
    const double worst = fold_lanes<kThreads>(beyond ? 1.0 : 0.0);
    return worst > 0 ? -1.0 : std::sqrt(sum);
  }

  /// Alphabets of all bands at a step; returns the payload's bits.
  __device__ std::int64_t choose_alphabets(float step) {
    return choose_alphabets(step, [](std::int64_t j) { return j; });
  }
  template <class Order>
  __device__ std::int64_t choose_alphabets(float step, Order order) {
    const float inverse = 1.0F / step;
    std::int64_t bits = 0;
    for (std::int64_t first = 0; first < bands; first += kThreads) {
      const std::int64_t band = first + threadIdx.x;
      std::int32_t mine = 0, total = 0;
      if (band < bands) {
        const std::int64_t from = band * kBandValues;
        const int values =
            static_cast<int>(hidden - from < kBandValues ? hidden - from : kBandValues);
        std::int32_t largest = 0;
        for (int i = 0; i < values; ++i) {
          const std::int32_t q = quantized(order(from + i), inverse);
          largest = largest > q ? largest : q;
          largest = largest > -q ? largest : -q;
        }
        const int chosen = alphabet_for(largest);
        index[band] = static_cast<std::uint8_t>(chosen);
        mine = band_bits(chosen, values);
      }
      static_cast<void>(exclusive_sum<kThreads>(mine, &total));
      bits += total;
    }
    __syncthreads();
    return bits;
  }

  /// The payload of the chosen alphabets, over x; bytes is its size.
  __device__ const std::uint8_t* pack(float step, std::int64_t bytes) {
    const float inverse = 1.0F / step;
    auto* words = reinterpret_cast<std::uint32_t*>(x);
    for (std::int64_t i = threadIdx.x; i < (bytes + 3) / 4; i += kThreads) words[i] = 0;
    std::int32_t position = 0;
    const std::int64_t units = (hidden + kUnitValues - 1) / kUnitValues;
    __syncthreads();
    for (std::int64_t first = 0; first < units; first += kThreads) {
      const std::int64_t unit = first + threadIdx.x, from = unit * kUnitValues;
      int values = 0, chosen = 0;
      std::int32_t mine = 0, total = 0;
      if (unit < units) {
        values = static_cast<int>(hidden - from < kUnitValues ? hidden - from : kUnitValues);
        chosen = index[unit / 2];
        mine = alphabet_table().alphabet[chosen].bits[values];
      }
      std::int32_t at = position + exclusive_sum<kThreads>(mine, &total);
      position += total;
      if (chosen == 0) continue;
      const Alphabet& alphabet = alphabet_table().alphabet[chosen];
      std::uint32_t digit[kUnitValues];
      for (int i = 0; i < kUnitValues; ++i) {
        digit[i] = i < values
                       ? static_cast<std::uint32_t>(quantized(from + i, inverse) + alphabet.half)
                       : 0;
      }
      if (chosen < kFirstWideAlphabet) {
        put(words, at, join_digits(alphabet, digit));
      } else {
        for (int i = 0; i < values; ++i, at += alphabet.bits[1]) put(words, at, digit[i]);
      }
    }
    __syncthreads();
    return reinterpret_cast<const std::uint8_t*>(x);
  }

 private:
  // Bits of others in the same word do not overlap: the order of the ORs changes nothing.
  __device__ static void put(std::uint32_t* words, std::int32_t at, std::uint64_t value) {
    const int shift = at & 31;
    const std::uint64_t low = value << shift;
    std::uint32_t* word = words + (at >> 5);
    if (static_cast<std::uint32_t>(low) != 0) atomicOr(word, static_cast<std::uint32_t>(low));
    if (low >> 32 != 0) atomicOr(word + 1, static_cast<std::uint32_t>(low >> 32));
    const std::uint64_t high = shift > 0 ? value >> (64 - shift) : 0;
    if (high != 0) atomicOr(word + 2, static_cast<std::uint32_t>(high));
  }
};

template <int kThreads>
__device__ void write_record(std::uint8_t* record, const StepCode& steps, std::uint16_t step,
                             std::uint32_t salt, std::int32_t id_bytes, std::uint32_t id,
                             const std::uint8_t* index, std::int64_t bands) {
  const auto step_bytes = static_cast<std::int64_t>(steps.bytes());
  const std::int64_t front = step_bytes + (steps.dithered() ? 1 : 0);
  if (threadIdx.x == 0) {
    for (std::int64_t i = 0; i < step_bytes; ++i) {
      record[i] = static_cast<std::uint8_t>(step >> (8 * i));
    }
    if (steps.dithered()) record[step_bytes] = static_cast<std::uint8_t>(salt);
    for (std::int64_t i = 0; i < id_bytes; ++i) {
      record[front + i] = static_cast<std::uint8_t>(id >> (8 * i));
    }
  }
  std::uint8_t* indices = record + front + id_bytes;
  for (std::int64_t i = threadIdx.x; i < (bands + 1) / 2; i += kThreads) {
    // No index: a row without alphabets.
    const int low = index != nullptr ? index[2 * i] : 0;
    const int high = index != nullptr && 2 * i + 1 < bands ? index[2 * i + 1] : 0;
    indices[i] = static_cast<std::uint8_t>(low | high << 4);
  }
}

/// kCoefficients: what is coded is not the rows, but these; the rows are what travels whole.
template <class T, int kThreads, bool kCoefficients>
__global__ void __launch_bounds__(kThreads, 2)
    encode_rows_kernel(CodedRows out, RowsOf<T> rows, const float* coefficients,
                       const CodedGroup* groups, std::int64_t group_count, const double* squared,
                       const double* bounds, const std::int32_t* ids) {
  using Received = std::conditional_t<kCoefficients, float, T>;
  BlockRow<T, kThreads> row(rows.hidden);
  const auto whole_bytes = rows.hidden * static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t i = blockIdx.x; i < rows.rows; i += gridDim.x) {
    const CodedGroup group = groups[group_of(groups, group_count, i)];
    const StepCode steps(group.step, group.dithered, group.dither_key);
    const std::uint32_t id =
        group.id_bytes > 0 && ids != nullptr ? static_cast<std::uint32_t>(ids[i]) : 0;
    const float* base =
        !kCoefficients && group.bases != nullptr ? group.bases + id * rows.hidden : nullptr;
    const double bound = bounds[i], allowed = bound * (1 - 1e-12);
    std::uint8_t* record = out.records + i * out.record_stride;
    std::uint8_t* payload = out.payloads + i * out.payload_stride;
    std::uint16_t code = steps.whole_row();
    std::int64_t bytes = whole_bytes;
    double error = 0;
    bool packed = false;
    row.steps = steps;
    row.salt = 0;
    if (squared[i] == 0) {
      code = steps.zero_row();
      bytes = 0;
    } else {
      if (kCoefficients) {
        row.load_coefficients(coefficients + i * rows.hidden);
      } else {
        row.load(row_at(rows, i), group, base);
      }
      if (steps.dithered()) row.set_salt(row_at(rows, i));
      bool done = false;
      if (!steps.dithered() && row.residual_norm() <= bound) {
        // What the receiver has already is near enough: any step does.
        const std::uint16_t any = steps.bytes() == 1 ? std::uint16_t{0} : step_code(1.0F);
        const double left = row.template true_error<Received>(base, steps.value(any), true);
        if (left <= allowed) {
          code = any;
          bytes = 0;
          error = left;
          done = true;
        }
      }
      if (!done) {
        std::uint16_t tried = bound > 0 ? steps.below(row.search_step(bound)) : steps.zero_row();
        for (int attempt = 0; attempt < 6 && steps.is_step(tried); ++attempt) {
          const float step = steps.value(tried);
          const double left = row.template true_error<Received>(base, step, false);
          if (left < 0) break;  // too large for any alphabet
          if (left <= allowed) {
            const std::int64_t size = (row.choose_alphabets(step) + 7) / 8;
            if (size >= whole_bytes) break;
            const std::uint8_t* from = row.pack(step, size);
            copy_bytes(payload, from, size);
            code = tried;
            bytes = size;
            error = left;
            packed = true;
            break;
          }
          tried = steps.smaller(tried, 1 << attempt);
        }
      }
    }
    write_record<kThreads>(record, steps, code, packed ? row.salt : 0, group.id_bytes, id,
                           packed ? row.index : nullptr, row.bands);
    if (threadIdx.x == 0) {
      out.payload_bytes[i] = bytes;
      out.whole[i] = code == steps.whole_row() ? 1 : 0;
      out.error[i] = error;
    }
  }
}

/// Bits of a row's payload, in the group's order and in another.
struct BitCounts {
  std::int64_t plain, ordered;
};
template <class T, int kThreads>
__device__ BitCounts estimate_row(BlockRow<T, kThreads>& row, const T* from,
                                  const CodedGroup& group, double bound, std::int64_t id,
                                  const std::int32_t* count_order, std::int64_t whole_bits) {
  const StepCode steps(group.step, group.dithered, group.dither_key);
  row.steps = steps;  // all rows with salt 0
  row.load(from, group, group.bases != nullptr ? group.bases + id * row.hidden : nullptr);
  if (!steps.dithered() && row.residual_norm() <= bound) return {0, 0};
  const std::uint16_t code = bound > 0 ? steps.below(row.search_step(bound)) : steps.zero_row();
  if (!steps.is_step(code)) return {whole_bits, whole_bits};
  const float step = steps.value(code), inverse = 1.0F / step;
  double beyond = 0;
  for (std::int64_t j = threadIdx.x; j < row.hidden; j += kThreads) {
    const std::int32_t q = row.quantized(j, inverse);
    if (q > kMaxQuantized || q < -kMaxQuantized) beyond = 1;
  }
  if (fold_lanes<kThreads>(beyond) != 0) return {whole_bits, whole_bits};
  const std::int64_t found = row.choose_alphabets(step);
  const std::int64_t plain = whole_bits < found ? whole_bits : found;
  if (count_order == nullptr) return {plain, plain};
  const std::int64_t other = row.choose_alphabets(
      step, [count_order](std::int64_t j) { return std::int64_t{count_order[j]}; });
  return {plain, whole_bits < other ? whole_bits : other};
}
__device__ inline void add_bits(std::int64_t* bits, const BitCounts& found) {
  atomicAdd(reinterpret_cast<unsigned long long*>(bits),
            static_cast<unsigned long long>(found.plain));
  atomicAdd(reinterpret_cast<unsigned long long*>(bits + 1),
            static_cast<unsigned long long>(found.ordered));
}

template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads, 2)
    estimate_rows_kernel(std::int64_t* bits, RowsOf<T> rows, std::int64_t stride,
                         const CodedGroup* groups, const double* bounds, const std::int32_t* ids,
                         const std::int32_t* count_order, std::int64_t whole_bits) {
  BlockRow<T, kThreads> row(rows.hidden);
  const CodedGroup group = *groups;
  for (std::int64_t s = blockIdx.x; s * stride < rows.rows; s += gridDim.x) {
    const std::int64_t i = s * stride;
    const BitCounts found = estimate_row(row, row_at(rows, i), group, bounds[i],
                                         ids != nullptr ? ids[i] : 0, count_order, whole_bits);
    if (threadIdx.x == 0) add_bits(bits, found);
  }
}

template <int kThreads>
__global__ void choose_ids_kernel(CodedGroup* group, const std::int64_t* with,
                                  const std::int64_t* without, std::int64_t samples) {
  if (threadIdx.x == 0 && !(with[0] + samples * 8 * group->id_bytes < without[0])) {
    group->id_bytes = 0;
  }
}

__device__ inline void report(std::int64_t* bad, BadRow kind, std::int64_t row) {
  atomicMin(reinterpret_cast<long long*>(bad + kind), static_cast<long long>(row));
}

__device__ inline std::uint32_t little_endian(const std::uint8_t* from, std::int64_t bytes) {
  std::uint32_t value = 0;
  for (std::int64_t i = 0; i < bytes; ++i) value |= std::uint32_t{from[i]} << (8 * i);
  return value;
}

/// What a record says, but for its bands.
struct RecordHead {
  StepCode steps;
  std::uint16_t step;
  std::uint32_t salt;
  std::uint32_t id;
  const std::uint8_t* indices;
};
__device__ inline RecordHead read_record(const CodedGroup& group, std::int64_t row,
                                         std::int64_t bands) {
  RecordHead head{StepCode(group.step, group.dithered, group.dither_key), 0, 0, 0, nullptr};
  const auto step_bytes = static_cast<std::int64_t>(head.steps.bytes());
  const std::int64_t front = step_bytes + (group.dithered ? 1 : 0);
  const std::int64_t record_bytes = front + group.id_bytes + (bands + 1) / 2;
  const std::uint8_t* record = group.records + (row - group.first) * record_bytes;
  head.step = static_cast<std::uint16_t>(little_endian(record, step_bytes));
  if (group.dithered) head.salt = record[step_bytes];
  head.id = little_endian(record + front, group.id_bytes);
  head.indices = record + front + group.id_bytes;
  return head;
}
__device__ inline int band_index(const std::uint8_t* indices, std::int64_t band) {
  return band % 2 == 0 ? indices[band / 2] & 15 : indices[band / 2] >> 4;
}

/// A warp a row.
template <int kThreads>
__global__ void record_sizes_kernel(std::int64_t* payload_bytes, std::int64_t* bad,
                                    const CodedGroup* groups, std::int64_t group_count,
                                    std::int64_t rows, std::int64_t hidden,
                                    std::int64_t whole_bytes) {
  const std::int64_t bands = (hidden + kBandValues - 1) / kBandValues;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t warps = std::int64_t{gridDim.x} * (blockDim.x / 32);
  for (std::int64_t i = std::int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32; i < rows;
       i += warps) {
    const CodedGroup group = groups[group_of(groups, group_count, i)];
    const RecordHead head = read_record(group, i, bands);
    std::int32_t bits = 0;
    for (std::int64_t band = lane; band < bands; band += 32) {
      const std::int64_t left = hidden - band * kBandValues;
      bits += band_bits(band_index(head.indices, band),
                        static_cast<int>(left < kBandValues ? left : kBandValues));
    }
    for (int half = 16; half > 0; half /= 2) bits += __shfl_xor_sync(kAllLanes, bits, half);
    if (lane != 0) continue;
    const bool whole = head.step == head.steps.whole_row(),
               zero = head.step == head.steps.zero_row();
    // With an odd number of bands the last half byte is padding.
    const bool padded = bands % 2 == 0 || head.indices[bands / 2] >> 4 == 0;
    const bool good = whole || zero ? bits == 0 : head.steps.is_step(head.step);
    if (!padded || !good) report(bad, kBadRecord, i);
    if (head.id > static_cast<std::uint32_t>(group.centroids)) report(bad, kBadId, i);
    payload_bytes[i] = whole ? whole_bytes : (bits + 7) / 8;
  }
}

template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads, 2)
    decode_rows_kernel(T* out, const std::int64_t* index, std::int64_t out_rows, std::int64_t* bad,
                       const CodedGroup* groups, std::int64_t group_count,
                       const std::int64_t* offset, std::int64_t rows, std::int64_t hidden,
                       float* values, std::int32_t* base_id) {
  const std::int64_t bands = (hidden + kBandValues - 1) / kBandValues;
  const std::int64_t units = (hidden + kUnitValues - 1) / kUnitValues;
  T* natural = reinterpret_cast<T*>(dynamic_shared());  // [hidden]
  for (std::int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const CodedGroup group = groups[group_of(groups, group_count, i)];
    const RecordHead head = read_record(group, i, bands);
    const std::int64_t to = index != nullptr ? index[i] : i;
    if (base_id != nullptr && threadIdx.x == 0) base_id[i] = -1;
    if (to < 0 || to >= out_rows || head.id > static_cast<std::uint32_t>(group.centroids)) continue;
    T* row = out + to * hidden;
    float* own = group.coefficients ? values + i * hidden : nullptr;
    const std::uint8_t* payload = group.payloads + offset[i];
    if (head.step == head.steps.zero_row()) {
      for (std::int64_t j = threadIdx.x; j < hidden; j += kThreads) row[j] = T{};
      continue;
    }
    if (head.step == head.steps.whole_row()) {
      constexpr std::int64_t kPerWord = 8 / sizeof(T);
      for (std::int64_t j = threadIdx.x * kPerWord; j < hidden; j += kThreads * kPerWord) {
        const std::uint64_t word =
            load_before(payload + j * static_cast<std::int64_t>(sizeof(T)), group.end);
        for (std::int64_t k = 0; k < kPerWord && j + k < hidden; ++k) {
          const auto bits = word >> (8 * sizeof(T) * static_cast<unsigned>(k));
          std::memcpy(row + j + k, &bits, sizeof(T));
        }
      }
      continue;
    }
    const float step = head.steps.value(head.step);
    const float* base =
        own == nullptr && group.bases != nullptr ? group.bases + head.id * hidden : nullptr;
    if (own != nullptr && threadIdx.x == 0) base_id[i] = static_cast<std::int32_t>(head.id);
    std::int32_t position = 0;
    bool valid = true;
    __syncthreads();  // the row before may still be read
    for (std::int64_t first = 0; first < units; first += kThreads) {
      const std::int64_t unit = first + threadIdx.x, from = unit * kUnitValues;
      int values = 0, chosen = 0;
      std::int32_t mine = 0, total = 0;
      if (unit < units) {
        values = static_cast<int>(hidden - from < kUnitValues ? hidden - from : kUnitValues);
        chosen = band_index(head.indices, unit / 2);
        mine = alphabet_table().alphabet[chosen].bits[values];
      }
      std::int64_t at = position + exclusive_sum<kThreads>(mine, &total);
      position += total;
      const Alphabet& alphabet = alphabet_table().alphabet[chosen];
      std::uint32_t digit[kUnitValues] = {};
      const auto read = [&](int bits) {
        const std::uint64_t word = load_before(payload + (at >> 3), group.end);
        return word >> (at & 7) & ((std::uint64_t{1} << bits) - 1);
      };
      if (chosen == 0) {
        // all zero, no bits
      } else if (chosen < kFirstWideAlphabet) {
        const std::uint64_t number = read(mine);
        valid &= number < alphabet.power[values];
        split_digits(alphabet, number, digit);
      } else {
        for (int k = 0; k < values; ++k, at += alphabet.bits[1]) {
          digit[k] = static_cast<std::uint32_t>(read(alphabet.bits[1]));
          valid &= digit[k] < alphabet.size;
        }
      }
      for (int k = 0; k < values; ++k) {
        const std::int64_t j = from + k;
        auto level = static_cast<float>(static_cast<std::int32_t>(digit[k]) - alphabet.half);
        if (group.dithered) {
          level -= dither(group.dither_key, static_cast<std::uint32_t>(j), head.salt);
        }
        if (own != nullptr) {
          own[j] = reconstruct<float>(0.0F, level, step);
        } else {
          natural[group.order != nullptr ? group.order[j] : j] =
              reconstruct<T>(base != nullptr ? base[j] : 0.0F, level, step);
        }
      }
    }
    if (!valid) report(bad, kBadNumber, i);
    if (own != nullptr) continue;
    __syncthreads();
    for (std::int64_t j = threadIdx.x; j < hidden; j += kThreads) row[j] = natural[j];
  }
}

}  // namespace lshmoe::kernels::cuda
