#pragma once
// Bucket keys, segment means, nearest centroids.

#include "lshmoe/kernels/cuda/vector.cuh"
#include "lshmoe/kernels/lsh.hpp"

namespace lshmoe::kernels::cuda {

template <int kThreads>
__global__ void bucket_keys_kernel(std::uint64_t* keys, const float* z, std::int64_t rows,
                                   std::int64_t stride, int hashes, int m) {
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < rows; i += step) {
    keys[i] = bucket_key(z + i * stride, hashes, m);
  }
}

/// A thread a column, a block kThreads columns of a segment.
template <int kThreads>
__global__ void segment_mean_kernel(float* out, const float* x, const std::int64_t* order,
                                    const std::int64_t* offsets, std::int64_t segments,
                                    std::int64_t columns) {
  const std::int64_t parts = (columns + kThreads - 1) / kThreads;
  for (std::int64_t unit = blockIdx.x; unit < segments * parts; unit += gridDim.x) {
    const std::int64_t s = unit / parts, j = unit % parts * kThreads + threadIdx.x;
    if (j >= columns) continue;
    const std::int64_t first = offsets[s], last = offsets[s + 1];
    float sum = 0;
    std::int64_t i = first;
    // Loads ahead of the sum, whose order is fixed.
    constexpr int kAhead = 8;
    for (; i + kAhead <= last; i += kAhead) {
      float value[kAhead];
      for (int k = 0; k < kAhead; ++k) value[k] = x[order[i + k] * columns + j];
      for (int k = 0; k < kAhead; ++k) sum += value[k];
    }
    for (; i < last; ++i) sum += x[order[i] * columns + j];
    out[s * columns + j] = last > first ? sum * (1.0F / static_cast<float>(last - first)) : 0.0F;
  }
}

template <int kThreads>
__global__ void half_norms_kernel(float* half_norm, const float* centroids, std::int64_t count,
                                  std::int64_t columns) {
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t k = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; k < count; k += step) {
    float sum = 0;
    for (std::int64_t j = 0; j < columns; ++j) {
      const float value = centroids[k * columns + j];
      sum += value * value;
    }
    half_norm[k] = 0.5F * sum;
  }
}

/// What a block keeps of rows and centroids while it scores them.
struct NearestTiles {
  static constexpr int kRowsEach = 4, kCentroidsEach = 4;  // of a thread
  static constexpr int kRowThreads = 8, kCentroidThreads = 16, kDepth = 16;
  static constexpr int kRows = kRowsEach * kRowThreads;
  static constexpr int kCentroids = kCentroidsEach * kCentroidThreads;
  float z[kDepth][kRows + 1];
  float c[kDepth][kCentroids + 1];
};

/// A block scores kRows rows from `first` on with kCentroids centroids at a time: thread (a, b) has
/// the rows a + 8 i and the centroids b + 16 j. Each product is one running sum over the columns,
/// as on the CPU. found(row, id, score): id 0 where the origin is as near or nearer.
template <int kThreads, class Found>
__device__ void nearest_of_tile(NearestTiles& tile, const float* z, const float* mean,
                                const float* centroids, const float* half_norm, std::int64_t first,
                                std::int64_t rows, std::int64_t count, std::int64_t columns,
                                Found found) {
  using Tiles = NearestTiles;
  static_assert(kThreads == Tiles::kRowThreads * Tiles::kCentroidThreads);
  const int t = static_cast<int>(threadIdx.x);
  const int a = t / Tiles::kCentroidThreads, b = t % Tiles::kCentroidThreads;
  float best[Tiles::kRowsEach] = {};
  std::int32_t best_id[Tiles::kRowsEach] = {};
  for (std::int64_t from = 0; from < count; from += Tiles::kCentroids) {
    float sum[Tiles::kRowsEach][Tiles::kCentroidsEach] = {};
    for (std::int64_t depth = 0; depth < columns; depth += Tiles::kDepth) {
      __syncthreads();
      for (int e = t; e < Tiles::kRows * Tiles::kDepth; e += kThreads) {
        const std::int64_t row = first + e / Tiles::kDepth, j = depth + e % Tiles::kDepth;
        float value = 0;
        if (row < rows && j < columns) {
          value = z[row * columns + j];
          if (mean != nullptr) value -= mean[j];
        }
        tile.z[e % Tiles::kDepth][e / Tiles::kDepth] = value;
      }
      for (int e = t; e < Tiles::kCentroids * Tiles::kDepth; e += kThreads) {
        const std::int64_t k = from + e / Tiles::kDepth, j = depth + e % Tiles::kDepth;
        tile.c[e % Tiles::kDepth][e / Tiles::kDepth] =
            k < count && j < columns ? centroids[k * columns + j] : 0;
      }
      __syncthreads();
      const int most =
          static_cast<int>(columns - depth < Tiles::kDepth ? columns - depth : Tiles::kDepth);
      for (int d = 0; d < most; ++d) {
        float left[Tiles::kRowsEach], right[Tiles::kCentroidsEach];
        for (int i = 0; i < Tiles::kRowsEach; ++i) left[i] = tile.z[d][a + Tiles::kRowThreads * i];
        for (int j = 0; j < Tiles::kCentroidsEach; ++j) {
          right[j] = tile.c[d][b + Tiles::kCentroidThreads * j];
        }
        for (int i = 0; i < Tiles::kRowsEach; ++i) {
          for (int j = 0; j < Tiles::kCentroidsEach; ++j) sum[i][j] += left[i] * right[j];
        }
      }
    }
    for (int j = 0; j < Tiles::kCentroidsEach; ++j) {
      const std::int64_t k = from + b + Tiles::kCentroidThreads * j;
      if (k >= count) continue;
      const float half = half_norm[k];
      for (int i = 0; i < Tiles::kRowsEach; ++i) {
        const float score = sum[i][j] - half;
        // Rising k within a thread: the first of equal ones stays.
        if (score > best[i]) {
          best[i] = score;
          best_id[i] = static_cast<std::int32_t>(k + 1);
        }
      }
    }
  }
  // The threads with the same rows are half a warp.
  for (int i = 0; i < Tiles::kRowsEach; ++i) {
    for (int by = Tiles::kCentroidThreads / 2; by > 0; by /= 2) {
      const float score = __shfl_xor_sync(kAllLanes, best[i], by);
      const std::int32_t other = __shfl_xor_sync(kAllLanes, best_id[i], by);
      if (other != 0 && (score > best[i] || (score == best[i] && other < best_id[i]))) {
        best[i] = score;
        best_id[i] = other;
      }
    }
    const std::int64_t row = first + a + Tiles::kRowThreads * i;
    if (b == 0 && row < rows) found(row, best_id[i], best[i]);
  }
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    nearest_centroid_kernel(std::int32_t* id, const float* z, const float* mean,
                            const float* centroids, const float* half_norm, std::int64_t rows,
                            std::int64_t count, std::int64_t columns) {
  __shared__ NearestTiles tiles;
  for (std::int64_t first = std::int64_t{blockIdx.x} * NearestTiles::kRows; first < rows;
       first += std::int64_t{gridDim.x} * NearestTiles::kRows) {
    nearest_of_tile<kThreads>(
        tiles, z, mean, centroids, half_norm, first, rows, count, columns,
        [&](std::int64_t row, std::int32_t found, float) { id[row] = found; });
  }
}

}  // namespace lshmoe::kernels::cuda
