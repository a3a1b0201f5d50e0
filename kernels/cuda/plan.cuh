#pragma once
// Means, channel orders, estimates and decisions for the groups of a call.

#include "lshmoe/kernels/bands.hpp"
#include "lshmoe/kernels/cuda/clusters.cuh"
#include "lshmoe/kernels/cuda/row_coder.cuh"

namespace lshmoe::kernels::cuda {

// Plans that look better than this on the sample of rows are better on all of them.
inline constexpr double kSampleTrust = 0.85;
inline constexpr std::int64_t kMoreRows = 256;

/// Loads ahead of a sum, whose order is fixed: value(i) for i in first .. last.
template <class Value>
__device__ float ordered_sum(std::int64_t first, std::int64_t last, Value value) {
  constexpr int kAhead = 8;
  float sum = 0;
  std::int64_t i = first;
  for (; i + kAhead <= last; i += kAhead) {
    float values[kAhead];
    for (int k = 0; k < kAhead; ++k) values[k] = value(i + k);
    for (int k = 0; k < kAhead; ++k) sum += values[k];
  }
  for (; i < last; ++i) sum += value(i);
  return sum;
}

/// A thread a column, a block kThreads columns of a chunk.
template <class T, int kThreads>
__global__ void chunk_sums_kernel(float* sums, PlanRows plan, RowsOf<T> rows) {
  const std::int64_t hidden = rows.hidden, parts = (hidden + kThreads - 1) / kThreads;
  for (std::int64_t unit = blockIdx.x; unit < plan.chunks * parts; unit += gridDim.x) {
    const std::int64_t c = unit / parts, j = unit % parts * kThreads + threadIdx.x;
    if (j >= hidden) continue;
    const ChunkRows part = rows_of_chunk(plan, c);
    sums[c * hidden + j] = ordered_sum(
        part.first, part.last, [&](std::int64_t i) { return to_float(row_at(rows, i)[j]); });
  }
}
template <int kThreads>
__global__ void fold_means_kernel(float* mean, const float* sums, PlanRows plan,
                                  std::int64_t hidden) {
  const std::int64_t parts = (hidden + kThreads - 1) / kThreads;
  for (std::int64_t unit = blockIdx.x; unit < plan.group_count * parts; unit += gridDim.x) {
    const std::int64_t g = unit / parts, j = unit % parts * kThreads + threadIdx.x;
    if (j >= hidden) continue;
    const PlanGroup& group = plan.groups[g];
    const std::int64_t last = group.chunk + (group.rows + kChunkRows - 1) / kChunkRows;
    const float sum =
        ordered_sum(group.chunk, last, [&](std::int64_t c) { return sums[c * hidden + j]; });
    mean[g * hidden + j] = sum * (1.0F / static_cast<float>(group.rows));
  }
}

/// A thread a channel, a block kThreads channels of a group.
template <class T, int kThreads>
__global__ void channel_energy_kernel(float* energy, RowsOf<T> rows, const CodedGroup* groups,
                                      std::int64_t group_count, const double* bound,
                                      const std::int32_t* id) {
  const std::int64_t hidden = rows.hidden, parts = (hidden + kThreads - 1) / kThreads;
  for (std::int64_t unit = blockIdx.x; unit < group_count * parts; unit += gridDim.x) {
    const std::int64_t g = unit / parts, j = unit % parts * kThreads + threadIdx.x;
    if (j >= hidden) continue;
    const std::int64_t first = groups[g].first, count = groups[g].rows;
    const float* bases = groups[g].bases;
    const std::int64_t stride = count / kEnergyRows > 1 ? count / kEnergyRows : 1;
    energy[g * hidden + j] =
        ordered_sum(0, (count + stride - 1) / stride, [&](std::int64_t sample) {
          const std::int64_t i = first + sample * stride;
          if (!(bound[i] > 1e-30) || !(bound[i] < 1e30)) return 0.0F;
          const float base =
              bases != nullptr ? bases[(id != nullptr ? id[i] : 0) * hidden + j] : 0.0F;
          const float value =
              (to_float(row_at(rows, i)[j]) - base) * static_cast<float>(1 / bound[i]);
          return value * value;
        });
  }
}

/// A block a group: bitonic sort of (energy falling, channel) in shared memory, `padded` keys.
template <int kThreads>
__global__ void order_channels_kernel(std::int32_t* order, std::int32_t* place, const float* energy,
                                      std::int64_t group_count, std::int64_t hidden,
                                      std::int64_t padded) {
  auto* key = reinterpret_cast<std::uint64_t*>(dynamic_shared());
  for (std::int64_t g = blockIdx.x; g < group_count; g += gridDim.x) {
    __syncthreads();
    for (std::int64_t j = threadIdx.x; j < padded; j += kThreads) {
      key[j] = ~std::uint64_t{0};
      if (j < hidden) {
        key[j] = std::uint64_t{~float_bits(energy[g * hidden + j])} << 32 |
                 static_cast<std::uint64_t>(j);
      }
    }
    for (std::int64_t run = 2; run <= padded; run *= 2) {
      for (std::int64_t by = run / 2; by > 0; by /= 2) {
        __syncthreads();
        for (std::int64_t pair = threadIdx.x; pair < padded / 2; pair += kThreads) {
          const std::int64_t low = pair / by * 2 * by + pair % by, high = low + by;
          const bool rising = (low & run) == 0;
          if ((key[low] > key[high]) == rising) {
            const std::uint64_t other = key[low];
            key[low] = key[high];
            key[high] = other;
          }
        }
      }
    }
    __syncthreads();
    const std::int64_t bands = (hidden + kBandValues - 1) / kBandValues;
    for (std::int64_t band = threadIdx.x; band < bands; band += kThreads) {
      const std::int64_t from = band * kBandValues;
      const int values =
          static_cast<int>(hidden - from < kBandValues ? hidden - from : kBandValues);
      for (int i = 0; i < values; ++i) {
        const auto channel = static_cast<std::int32_t>(key[from + i]);
        // Rank within the band: channels are distinct.
        int rank = 0;
        for (int k = 0; k < values; ++k) {
          rank += static_cast<std::int32_t>(key[from + k]) < channel ? 1 : 0;
        }
        order[g * hidden + from + rank] = channel;
        place[g * hidden + channel] = static_cast<std::int32_t>(from + rank);
      }
    }
  }
}

__host__ __device__ inline std::int64_t sample_stride(std::int64_t rows, std::int64_t sample) {
  if (sample == 0) {
    sample = rows / 8 < 16 ? 16 : rows / 8;
    sample = sample < 64 ? sample : 64;
  }
  return rows / sample > 1 ? rows / sample : 1;
}

template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads, 2)
    estimate_groups_kernel(std::int64_t* bits, RowsOf<T> rows, std::int64_t sample,
                           const CodedGroup* groups, std::int64_t group_count, const double* bounds,
                           const std::int32_t* ids, const std::int32_t* count_order,
                           const PlanResult* results, Variant variant) {
  BlockRow<T, kThreads> row(rows.hidden);
  for (std::int64_t g = blockIdx.y; g < group_count; g += gridDim.y) {
    if (results != nullptr &&
        (results[g].again == 0 || (variant != kClusters && results[g].variant != variant))) {
      continue;
    }
    CodedGroup group = groups[g];
    if (count_order != nullptr) group.place = nullptr;
    const std::int64_t stride = sample_stride(group.rows, sample);
    for (std::int64_t s = blockIdx.x; s * stride < group.rows; s += gridDim.x) {
      const BitCounts found = estimate_row(
          row, row_at(rows, group.first + s * stride), group, bounds[group.first + s * stride],
          ids != nullptr ? ids[group.first + s * stride] : 0,
          count_order != nullptr ? count_order + g * rows.hidden : nullptr,
          8 * rows.hidden * static_cast<std::int64_t>(sizeof(T)));
      if (threadIdx.x == 0) add_bits(bits + 2 * g, found);
    }
  }
}

/// A block a slot and kThreads columns.
template <class T, int kThreads>
__global__ void centroid_means_kernel(float* bases, const float* mean, RowsOf<T> rows,
                                      const std::int64_t* order, const std::int64_t* begin,
                                      const std::int64_t* end, PlanRows plan) {
  const std::int64_t hidden = rows.hidden, parts = (hidden + kThreads - 1) / kThreads;
  const std::int64_t units = (plan.slots + plan.group_count) * parts;
  for (std::int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const std::int64_t at = unit / parts, j = unit % parts * kThreads + threadIdx.x;
    if (j >= hidden) continue;
    // Group g has the rows slot + g .. slot + g + most.
    const std::int64_t g = last_not_above(plan.group_count, at,
                                          [&](std::int64_t i) { return plan.groups[i].slot + i; });
    const PlanGroup& group = plan.groups[g];
    const std::int64_t k = at - group.slot - g - 1;
    float value = 0;
    if (k < 0) {
      value = mean[g * hidden + j];
    } else if (k < group.count) {
      const std::int64_t first = begin[group.slot + k], last = end[group.slot + k];
      value = ordered_sum(first, last,
                          [&](std::int64_t i) { return to_float(row_at(rows, order[i])[j]); });
      value *= 1.0F / static_cast<float>(last - first);
    }
    bases[at * hidden + j] = value;
  }
}

/// A block a slot.
template <int kThreads>
__global__ void centroid_rows_kernel(float* coded, const float* bases, const std::int32_t* order,
                                     PlanRows plan, std::int64_t hidden) {
  for (std::int64_t s = blockIdx.x; s < plan.slots; s += gridDim.x) {
    const std::int64_t g = group_of_slot(plan, s);
    const PlanGroup& group = plan.groups[g];
    const float* mean = bases + (group.slot + g) * hidden;
    const float* from = bases + (s + g + 1) * hidden;
    for (std::int64_t j = threadIdx.x; j < hidden; j += kThreads) {
      const std::int64_t channel = order != nullptr ? order[g * hidden + j] : j;
      coded[s * hidden + j] = s - group.slot < group.count ? from[channel] - mean[channel] : 0.0F;
    }
  }
}
template <int kThreads>
__global__ void decoded_centroids_kernel(float* ordered, float* natural, const float* decoded,
                                         const float* mean, const std::int32_t* order,
                                         PlanRows plan, std::int64_t hidden) {
  for (std::int64_t at = blockIdx.x; at < plan.slots + plan.group_count; at += gridDim.x) {
    const std::int64_t g = last_not_above(plan.group_count, at,
                                          [&](std::int64_t i) { return plan.groups[i].slot + i; });
    const std::int64_t s = at - g - 1;  // below the group's slot: the mean
    for (std::int64_t j = threadIdx.x; j < hidden; j += kThreads) {
      const std::int64_t channel = order != nullptr ? order[g * hidden + j] : j;
      float value = mean[g * hidden + channel];
      if (s >= plan.groups[g].slot) {
        value = decoded[s * hidden + j] + value;
        natural[s * hidden + channel] = value;
      }
      ordered[at * hidden + j] = value;
    }
  }
}

template <int kThreads>
__global__ void copy_whole_kernel(CodedRows coded, const float* x, std::int64_t rows,
                                  std::int64_t hidden) {
  for (std::int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    if (coded.whole[i] == 0) continue;
    auto* to = reinterpret_cast<float*>(coded.payloads + i * coded.payload_stride);
    for (std::int64_t j = threadIdx.x; j < hidden; j += kThreads) to[j] = x[i * hidden + j];
  }
}

/// Bits of a variant, as LshCodec's Plan counts them.
struct PlanBits {
  double bits;
  bool ordered;
};
__device__ inline PlanBits bits_of(const std::int64_t* bits, const PlanCosts& costs,
                                   const PlanRows& plan, std::int64_t g, Variant variant,
                                   bool may_order) {
  const PlanGroup& group = plan.groups[g];
  const std::int64_t stride = sample_stride(group.rows, costs.sample);
  const auto rows = static_cast<double>(group.rows);
  const double scale = rows / static_cast<double>((group.rows + stride - 1) / stride);
  const std::int64_t* found = bits + (variant * plan.group_count + g) * 2;
  double shared = variant == kPlain
                      ? 0.0
                      : 8.0 * static_cast<double>(costs.record_bytes + costs.mean_payload[g]);
  const double order_bits = 8.0 * static_cast<double>(costs.order_bytes);
  if (variant == kClusters) {
    std::int64_t payloads = 0;
    for (std::int32_t k = 0; k < group.count; ++k) {
      payloads += costs.centroid_payload[group.slot + k];
    }
    shared += 8.0 * static_cast<double>(group.count * costs.record_bytes + payloads);
    shared += 8.0 * rows * (group.count < 256 ? 1 : 2);
    // Centroids are coded in the channel order: it stays with them. The rows are in it already.
    if (costs.has_order) shared += order_bits;
    return {scale * static_cast<double>(found[0]) + shared, costs.has_order};
  }
  const double saved = scale * static_cast<double>(found[0] - found[1]);
  const bool ordered = costs.has_order && may_order && saved > order_bits;
  return {scale * static_cast<double>(found[0]) + shared + (ordered ? order_bits - saved : 0.0),
          ordered};
}

/// A thread a group.
template <int kThreads>
__global__ void decide_kernel(PlanResult* results, PlanCosts costs, PlanRows plan, bool again) {
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t g = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; g < plan.group_count;
       g += stride) {
    const PlanGroup& group = plan.groups[g];
    PlanResult& result = results[g];
    if (again && result.again == 0) continue;
    PlanBits best =
        bits_of(costs.bits, costs, plan, g, again ? static_cast<Variant>(result.variant) : kPlain,
                again ? result.ordered != 0 : true);
    if (!again) {
      result = PlanResult{};
      // A mean beyond fp32 is none.
      if (is_finite(costs.mean_squared[g])) {
        const PlanBits less_mean = bits_of(costs.bits, costs, plan, g, kMean, true);
        if (less_mean.bits < best.bits) {
          best = less_mean;
          result.variant = kMean;
        }
      }
      result.mean_payload = costs.mean_payload[g];
    }
    result.ordered = best.ordered ? 1 : 0;
    if (!costs.has_clusters || group.count == 0) continue;
    const PlanBits clusters = bits_of(costs.bits, costs, plan, g, kClusters, true);
    // A narrow gain may be the sample's luck.
    const bool narrow = clusters.bits > kSampleTrust * best.bits;
    result.again = !again && clusters.bits < best.bits && narrow ? 1 : 0;
    if (clusters.bits < best.bits && result.again == 0) {
      result.variant = kClusters;
      result.ordered = clusters.ordered ? 1 : 0;
      result.count = group.count;
      for (std::int32_t k = 0; k < group.count; ++k) {
        result.centroid_payloads += costs.centroid_payload[group.slot + k];
      }
    }
  }
}

/// A block a group.
template <int kThreads>
__global__ void use_plans_kernel(CodedGroup* coded, const CodedGroup* variants,
                                 const PlanResult* results, float* ordered, const float* mean,
                                 const std::int32_t* mean_order, PlanRows plan,
                                 std::int64_t hidden) {
  for (std::int64_t g = blockIdx.x; g < plan.group_count; g += gridDim.x) {
    const PlanResult result = results[g];
    const PlanGroup& group = plan.groups[g];
    if (threadIdx.x == 0) {
      CodedGroup use = variants[result.variant * plan.group_count + g];
      if (result.ordered == 0) use.order = use.place = nullptr;
      use.bases = result.variant == kPlain ? nullptr : ordered + (group.slot + g) * hidden;
      use.centroids = result.count;
      use.id_bytes = result.count == 0 ? 0 : result.count < 256 ? 1 : 2;
      coded[g] = use;
    }
    if (result.variant == kMean) {
      float* to = ordered + (group.slot + g) * hidden;
      for (std::int64_t j = threadIdx.x; j < hidden; j += kThreads) {
        to[j] = mean[g * hidden + (result.ordered != 0 ? mean_order[g * hidden + j] : j)];
      }
    }
    if (result.variant != kClusters) {
      for (std::int64_t i = threadIdx.x; i < group.rows; i += kThreads) {
        plan.id[group.first + i] = 0;
      }
    }
  }
}

/// A block a parcel.
template <int kThreads>
__global__ void write_shared_kernel(std::uint8_t* out, const SharedPlace* places,
                                    std::int64_t count, const PlanResult* results, PlanRows plan,
                                    CodedRows means, CodedRows centroids, const std::int32_t* place,
                                    std::int64_t record_bytes, std::int64_t hidden) {
  const std::int64_t bands = (hidden + kBandValues - 1) / kBandValues;
  int bits = 0;  // of a channel's band
  while ((bands - 1) >> bits > 0) ++bits;
  for (std::int64_t p = blockIdx.x; p < count; p += gridDim.x) {
    const std::int64_t g = places[p].group;
    const PlanResult result = results[g];
    std::uint8_t* to = out + places[p].begin;
    if (result.ordered != 0) {
      const std::int32_t* own = place + (result.variant * plan.group_count + g) * hidden;
      const std::int64_t bytes = (hidden * bits + 7) / 8;
      for (std::int64_t b = threadIdx.x; b < bytes; b += kThreads) {
        std::uint32_t value = 0;
        for (std::int64_t c = 8 * b / bits; c < hidden && c * bits < 8 * b + 8; ++c) {
          const auto band = static_cast<std::uint32_t>(own[c] / kBandValues);
          const auto shift = static_cast<int>(c * bits - 8 * b);
          value |= shift >= 0 ? band << shift : band >> -shift;
        }
        to[b] = static_cast<std::uint8_t>(value);
      }
      to += bytes;
    }
    if (result.variant == kPlain) continue;
    copy_bytes(to, means.records + g * means.record_stride, record_bytes);
    to += record_bytes;
    const std::int64_t slot = plan.groups[g].slot;
    std::uint8_t* payload = to + result.count * record_bytes;
    copy_bytes(payload, means.payloads + g * means.payload_stride, result.mean_payload);
    payload += result.mean_payload;
    for (std::int64_t k = slot; k < slot + result.count; ++k, to += record_bytes) {
      copy_bytes(to, centroids.records + k * centroids.record_stride, record_bytes);
      copy_bytes(payload, centroids.payloads + k * centroids.payload_stride,
                 centroids.payload_bytes[k]);
      payload += centroids.payload_bytes[k];
    }
  }
}

template <int kThreads>
__global__ void assignments_kernel(std::int64_t* out, const std::int32_t* id, PlanRows plan,
                                   const std::int64_t* centroids_before) {
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < plan.rows;
       i += stride) {
    const std::int64_t before = centroids_before[group_of(plan.groups, plan.group_count, i)];
    out[i] = id[i] > 0 && before >= 0 ? before + id[i] - 1 : -1;
  }
}

}  // namespace lshmoe::kernels::cuda
