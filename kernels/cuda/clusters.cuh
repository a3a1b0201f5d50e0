#pragma once
// Clusters of each group of a call, as compress/clusters.cpp.

#include <cmath>

#include "lshmoe/kernels/cuda/block.cuh"
#include "lshmoe/kernels/cuda/lsh.cuh"
#include "lshmoe/kernels/cuda/plan.hpp"

namespace lshmoe::kernels::cuda {

/// Last of `count` groups whose first(g) is not above `value`.
template <class First>
__device__ std::int64_t last_not_above(std::int64_t count, std::int64_t value, First first) {
  std::int64_t low = 0, high = count;
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    if (first(middle) <= value) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}
__device__ inline std::int64_t group_of_chunk(const PlanRows& plan, std::int64_t chunk) {
  return last_not_above(plan.group_count, chunk,
                        [&](std::int64_t g) { return plan.groups[g].chunk; });
}
__device__ inline std::int64_t group_of_slot(const PlanRows& plan, std::int64_t slot) {
  return last_not_above(plan.group_count, slot,
                        [&](std::int64_t g) { return plan.groups[g].slot; });
}
/// Rows first .. last of a chunk of its group.
struct ChunkRows {
  std::int64_t group, first, last;
};
__device__ inline ChunkRows rows_of_chunk(const PlanRows& plan, std::int64_t chunk) {
  const std::int64_t g = group_of_chunk(plan, chunk);
  const PlanGroup& group = plan.groups[g];
  const std::int64_t from = (chunk - group.chunk) * kChunkRows;
  const std::int64_t to = from + kChunkRows < group.rows ? from + kChunkRows : group.rows;
  return {g, group.first + from, group.first + to};
}

__device__ inline double warp_total(double value) {
  for (int by = 16; by > 0; by /= 2) value += __shfl_xor_sync(kAllLanes, value, by);
  return value;
}

/// Bits an element of a row whose residual has `ratio` times its squared bound: clusters.cpp.
__device__ inline double expected_bits(double ratio) { return 0.5 * std::log2(1 + 2.3 * ratio); }
__device__ inline bool is_finite(double value) {
  return value <= 1.7976931348623157e308 && value >= -1.7976931348623157e308;
}
__device__ inline double saving(const PlanRows& plan, std::int64_t row, float distance) {
  const float squared_bound = plan.squared_bound[row];
  if (!(squared_bound > 0)) return 0;
  const double bits = expected_bits(static_cast<double>(distance) / squared_bound);
  return is_finite(bits) ? plan.plain_bits[row] - bits : 0;
}

/// A warp a chunk: z less the group's center; energy of z, and of the rows.
template <int kThreads>
__global__ void center_rows_kernel(PlanRows plan, const float* center, const double* squared,
                                   double* part) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t warps = std::int64_t{gridDim.x} * (kThreads / 32);
  for (std::int64_t c = std::int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
       c < plan.chunks; c += warps) {
    const ChunkRows rows = rows_of_chunk(plan, c);
    const float* at = center + rows.group * plan.columns;
    double energy = 0, row_energy = 0;
    for (std::int64_t i = rows.first; i < rows.last; ++i) {
      float* z = plan.z + i * plan.columns;
      for (std::int64_t j = lane; j < plan.columns; j += 32) {
        const float value = z[j] - at[j];
        z[j] = value;
        energy += static_cast<double>(value) * static_cast<double>(value);
      }
      if (lane == 0) row_energy += squared[i];
    }
    energy = warp_total(energy);
    if (lane == 0) {
      part[2 * c] = energy;
      part[2 * c + 1] = row_energy;
    }
  }
}

/// A thread a group: the scale of z, and what its energy stands for.
template <int kThreads>
__global__ void scale_groups_kernel(PlanRows plan, const double* part, const double* mean_squared) {
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t g = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; g < plan.group_count;
       g += stride) {
    PlanGroup& group = plan.groups[g];
    double energy = 0, squared = 0;
    const std::int64_t last = group.chunk + (group.rows + kChunkRows - 1) / kChunkRows;
    for (std::int64_t c = group.chunk; c < last; ++c) {
      energy += part[2 * c];
      squared += part[2 * c + 1];
    }
    const auto rows = static_cast<double>(group.rows);
    const double rms = std::sqrt(energy / (rows * static_cast<double>(plan.columns)));
    group.scale = 1;
    group.energy_per_z = 0;
    // A mean beyond fp32 would make these NaN.
    if (!(rms > 1e-35) || !(rms < 1e35)) continue;
    const float scale = std::ldexp(1.0F, -std::ilogb(rms));
    const double centered = squared - rows * mean_squared[g];
    if (!(centered > 0) || !is_finite(centered)) continue;
    group.scale = scale;
    group.energy_per_z =
        centered / (energy * static_cast<double>(scale) * static_cast<double>(scale));
  }
}

/// A warp a row.
template <int kThreads>
__global__ void scale_rows_kernel(PlanRows plan, const double* bound) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t warps = std::int64_t{gridDim.x} * (kThreads / 32);
  for (std::int64_t i = std::int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
       i < plan.rows; i += warps) {
    const PlanGroup& group = plan.groups[group_of(plan.groups, plan.group_count, i)];
    float* z = plan.z + i * plan.columns;
    double energy = 0;
    for (std::int64_t j = lane; j < plan.columns; j += 32) {
      const float value = z[j] * group.scale;
      z[j] = value;
      energy += static_cast<double>(value) * static_cast<double>(value);
    }
    energy = warp_total(energy);
    if (lane != 0) continue;
    const float squared_bound =
        group.energy_per_z > 0 ? static_cast<float>(bound[i] * bound[i] / group.energy_per_z) : 0;
    const double bits = squared_bound > 0 ? expected_bits(energy / squared_bound) : 0;
    plan.squared_bound[i] = squared_bound;
    plan.z_energy[i] = static_cast<float>(energy);
    plan.plain_bits[i] = static_cast<float>(is_finite(bits) ? bits : 0);
    plan.id[i] = 0;
  }
}

template <int kThreads>
__global__ void group_keys_kernel(std::uint64_t* key, PlanRows plan, int hashes, int m,
                                  std::uint64_t buckets) {
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < plan.rows;
       i += stride) {
    const auto group = static_cast<std::uint64_t>(group_of(plan.groups, plan.group_count, i));
    key[i] = group * buckets + bucket_key(plan.z + i * plan.columns, hashes, m);
  }
}

/// The first of `count` sorted values that is not below `value`.
__device__ inline std::int64_t lower_bound(const std::uint64_t* sorted, std::int64_t first,
                                           std::int64_t last, std::uint64_t value) {
  while (first < last) {
    const std::int64_t middle = (first + last) / 2;
    if (sorted[middle] < value) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  return first;
}

template <int kThreads>
__global__ void bucket_sizes_kernel(std::uint64_t* by_size, const std::uint64_t* sorted,
                                    PlanRows plan, std::uint64_t buckets, int size_bits) {
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  const std::uint64_t most = (std::uint64_t{1} << size_bits) - 1;
  for (std::int64_t p = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; p < plan.rows;
       p += stride) {
    const std::uint64_t key = sorted[p];
    std::uint64_t size = 0;
    if (p == 0 || sorted[p - 1] != key) {
      size = static_cast<std::uint64_t>(lower_bound(sorted, p, plan.rows, key + 1) - p);
    }
    by_size[p] = (key / buckets) << size_bits | (most - size);
  }
}

template <int kThreads>
__global__ void largest_buckets_kernel(std::int64_t* begin, std::int64_t* end,
                                       const std::int64_t* bucket, const std::uint64_t* by_size,
                                       PlanRows plan, int size_bits) {
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  const std::uint64_t most = (std::uint64_t{1} << size_bits) - 1;
  const auto size_at = [&](std::int64_t p) {
    return static_cast<std::int64_t>(most - (by_size[p] & most));
  };
  for (std::int64_t s = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; s < plan.slots;
       s += stride) {
    PlanGroup& group = plan.groups[group_of_slot(plan, s)];
    const std::int64_t r = s - group.slot, p = group.first + r;  // most <= rows
    const std::int64_t size = size_at(p);
    begin[s] = bucket[p];
    end[s] = bucket[p] + size;
    // One thread writes: that of the last bucket, or of the last slot.
    if (size > 0 && (r + 1 == group.most || size_at(p + 1) == 0)) {
      group.seeds = static_cast<std::int32_t>(r + 1);
    }
  }
}

/// A block a slot: a warp sums every fourth member, then the warps are folded.
template <int kThreads>
__global__ void z_means_kernel(float* mean, const std::int64_t* order, const std::int64_t* begin,
                               const std::int64_t* end, PlanRows plan) {
  constexpr int kWarps = kThreads / 32;
  __shared__ float part[kWarps][32];
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  for (std::int64_t s = blockIdx.x; s < plan.slots; s += gridDim.x) {
    const std::int64_t first = begin[s], last = end[s];
    for (std::int64_t from = 0; from < plan.columns; from += 32) {
      const std::int64_t j = from + lane;
      float sum = 0;
      for (std::int64_t i = first + warp; i < last && j < plan.columns; i += kWarps) {
        sum += plan.z[order[i] * plan.columns + j];
      }
      __syncthreads();
      part[warp][lane] = sum;
      __syncthreads();
      if (warp != 0 || j >= plan.columns) continue;
      for (int w = 1; w < kWarps; ++w) sum += part[w][lane];
      mean[s * plan.columns + j] =
          last > first ? sum * (1.0F / static_cast<float>(last - first)) : 0.0F;
    }
  }
}

/// nearest_centroid_kernel, group by group.
template <int kThreads>
__global__ void __launch_bounds__(kThreads, 4)
    nearest_of_group_kernel(std::int32_t* id, float* distance, PlanRows plan,
                            const float* centroids, const float* half_norm, int level) {
  __shared__ NearestTiles tiles;
  for (std::int64_t g = blockIdx.y; g < plan.group_count; g += gridDim.y) {
    const PlanGroup& group = plan.groups[g];
    const std::int32_t count = level < 0 ? group.count : group.seeds >> level;
    const float* own = centroids + group.slot * plan.columns;
    const float* own_norm = half_norm + group.slot;
    for (std::int64_t first = std::int64_t{blockIdx.x} * NearestTiles::kRows; first < group.rows;
         first += std::int64_t{gridDim.x} * NearestTiles::kRows) {
      nearest_of_tile<kThreads>(tiles, plan.z + group.first * plan.columns, nullptr, own, own_norm,
                                first, group.rows, count, plan.columns,
                                [&](std::int64_t row, std::int32_t found, float score) {
                                  const std::int64_t i = group.first + row;
                                  const float left = plan.z_energy[i] - 2 * score;
                                  id[i] = found;
                                  distance[i] = left > 0 ? left : 0.0F;
                                });
    }
  }
}

/// A warp a chunk.
template <int kThreads>
__global__ void row_savings_kernel(double* part, const float* distance, PlanRows plan) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t warps = std::int64_t{gridDim.x} * (kThreads / 32);
  for (std::int64_t c = std::int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
       c < plan.chunks; c += warps) {
    const ChunkRows rows = rows_of_chunk(plan, c);
    double sum = 0;
    for (std::int64_t i = rows.first + lane; i < rows.last; i += 32) {
      sum += saving(plan, i, distance[i]);
    }
    sum = warp_total(sum);
    if (lane == 0) part[c] = sum;
  }
}

/// A thread a group: fewer and fewer seeds, while that pays better.
template <int kThreads>
__global__ void choose_level_kernel(PlanRows plan, const double* part, int levels,
                                    double centroid_bits, double id_bits) {
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t g = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; g < plan.group_count;
       g += stride) {
    PlanGroup& group = plan.groups[g];
    const std::int64_t last = group.chunk + (group.rows + kChunkRows - 1) / kChunkRows;
    const std::int32_t least = group.seeds < 4 ? group.seeds : 4;
    double best = 0;
    group.level = -1;
    group.count = 0;
    for (int level = 0; level < levels; ++level) {
      const std::int32_t count = group.seeds >> level;
      if (count < least || count < 1 || group.energy_per_z <= 0) break;
      double gain =
          -static_cast<double>(count) * centroid_bits - static_cast<double>(group.rows) * id_bits;
      for (std::int64_t c = group.chunk; c < last; ++c) gain += part[level * plan.chunks + c];
      if (gain > best) {
        best = gain;
        group.level = level;
        group.count = count;
      } else if (group.count > 0) {
        break;
      }
    }
  }
}
template <int kThreads>
__global__ void level_ids_kernel(PlanRows plan, const std::int32_t* level_ids) {
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < plan.rows;
       i += stride) {
    const std::int32_t level = plan.groups[group_of(plan.groups, plan.group_count, i)].level;
    plan.id[i] = level < 0 ? 0 : level_ids[level * plan.rows + i];
  }
}
/// A block a slot. ids are zeros before.
template <int kThreads>
__global__ void bucket_ids_kernel(PlanRows plan, const std::int64_t* order,
                                  const std::int64_t* begin, const std::int64_t* end) {
  for (std::int64_t s = blockIdx.x; s < plan.slots; s += gridDim.x) {
    const PlanGroup& group = plan.groups[group_of_slot(plan, s)];
    const std::int64_t k = s - group.slot;
    if (k >= group.count) continue;
    for (std::int64_t i = begin[s] + threadIdx.x; i < end[s]; i += kThreads) {
      plan.id[order[i]] = static_cast<std::int32_t>(k + 1);
    }
  }
}

template <int kThreads>
__global__ void cluster_keys_kernel(std::uint64_t* key, PlanRows plan, std::int64_t most) {
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < plan.rows;
       i += stride) {
    const std::int64_t g = group_of(plan.groups, plan.group_count, i);
    key[i] = static_cast<std::uint64_t>(g * (most + 1) + plan.id[i]);
  }
}
template <int kThreads>
__global__ void cluster_members_kernel(std::int64_t* begin, std::int64_t* end,
                                       const std::uint64_t* sorted, PlanRows plan,
                                       std::int64_t most) {
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t s = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; s < plan.slots;
       s += stride) {
    const std::int64_t g = group_of_slot(plan, s);
    const PlanGroup& group = plan.groups[g];
    const auto key = static_cast<std::uint64_t>(g * (most + 1) + s - group.slot + 1);
    begin[s] = lower_bound(sorted, group.first, group.first + group.rows, key);
    end[s] = lower_bound(sorted, begin[s], group.first + group.rows, key + 1);
  }
}

/// A warp a slot.
template <int kThreads>
__global__ void paying_centroids_kernel(std::uint8_t* keep, const float* mean,
                                        const std::int64_t* order, const std::int64_t* begin,
                                        const std::int64_t* end, PlanRows plan,
                                        double centroid_bits) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t warps = std::int64_t{gridDim.x} * (kThreads / 32);
  for (std::int64_t s = std::int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
       s < plan.slots; s += warps) {
    const PlanGroup& group = plan.groups[group_of_slot(plan, s)];
    double saved = 0;
    for (std::int64_t i = begin[s] + lane; i < end[s]; i += 32) {
      const std::int64_t row = order[i];
      float sum = 0;
      for (std::int64_t j = 0; j < plan.columns; ++j) {
        const float difference = plan.z[row * plan.columns + j] - mean[s * plan.columns + j];
        sum += difference * difference;
      }
      saved += saving(plan, row, sum);
    }
    saved = warp_total(saved);
    if (lane == 0) keep[s] = s - group.slot < group.count && saved - centroid_bits > 0 ? 1 : 0;
  }
}

/// A block a group. Slots move up one after another, each by the whole block.
template <int kThreads>
__global__ void drop_centroids_kernel(std::int32_t* number, const std::uint8_t* keep,
                                      std::int64_t* begin, std::int64_t* end, float* mean,
                                      float* half_norm, PlanRows plan) {
  for (std::int64_t g = blockIdx.x; g < plan.group_count; g += gridDim.x) {
    const std::int64_t slot = plan.groups[g].slot;
    const std::int32_t before = plan.groups[g].count;
    std::int32_t kept = 0;
    for (std::int32_t k = 0; k < before; ++k) {
      const std::int64_t from = slot + k, to = slot + kept;
      // The same for all threads: slot `from` is written by none before it was read.
      const std::int64_t first = begin[from], last = end[from];
      const bool stays = keep != nullptr ? keep[from] != 0 : last > first;
      __syncthreads();
      if (threadIdx.x == 0) {
        number[from] = stays ? kept + 1 : 0;
        if (stays) {
          begin[to] = first;
          end[to] = last;
          if (half_norm != nullptr) half_norm[to] = half_norm[from];
        }
      }
      if (stays && mean != nullptr && to != from) {
        for (std::int64_t j = threadIdx.x; j < plan.columns; j += kThreads) {
          mean[to * plan.columns + j] = mean[from * plan.columns + j];
        }
      }
      kept += stays ? 1 : 0;
    }
    __syncthreads();
    if (threadIdx.x == 0) plan.groups[g].count = kept;
    for (std::int64_t s = slot + kept + threadIdx.x; s < slot + before; s += kThreads) {
      begin[s] = end[s] = 0;
    }
    __syncthreads();
  }
}
template <int kThreads>
__global__ void renumber_kernel(PlanRows plan, const std::int32_t* number) {
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < plan.rows;
       i += stride) {
    if (plan.id[i] == 0) continue;
    const PlanGroup& group = plan.groups[group_of(plan.groups, plan.group_count, i)];
    plan.id[i] = number[group.slot + plan.id[i] - 1];
  }
}

}  // namespace lshmoe::kernels::cuda
