#include "lshmoe/kernels/lsh.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "lshmoe/kernels/cpu/panels.hpp"

namespace lshmoe::kernels {
namespace {
std::uint64_t splitmix64(std::uint64_t& state) {
  std::uint64_t z = (state += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

using namespace panels;
using IntVector = std::int32_t __attribute__((vector_size(32)));
// Rows whose best centroids stay in the first-level cache.
constexpr std::int64_t kRowBlock = 64;
}  // namespace

void random_orthonormal(float* out, std::int64_t rows, std::int64_t columns, std::uint64_t seed) {
  std::uint64_t state = seed;
  std::vector<std::vector<double>> block;
  for (std::int64_t column = 0; column < columns; ++column) {
    if (column % rows == 0) block.clear();
    std::vector<double> v(static_cast<std::size_t>(rows));
    for (double norm = 0; norm < 1e-2;) {
      double drawn = 0;
      // The number of ones among 64 random bits is close to normal, and exact everywhere.
      for (double& value : v) {
        value = std::popcount(splitmix64(state)) - 32;
        drawn += value * value;
      }
      for (int pass = 0; pass < 2; ++pass) {  // twice is enough (Kahan, Parlett)
        for (const auto& other : block) {
          double dot = 0;
          for (std::size_t i = 0; i < v.size(); ++i) dot += v[i] * other[i];
          for (std::size_t i = 0; i < v.size(); ++i) v[i] -= dot * other[i];
        }
      }
      double sum = 0;
      for (const double value : v) sum += value * value;
      // Nearly dependent on the earlier columns: draw again.
      norm = drawn > 0 ? std::sqrt(sum / drawn) : 0;
      const double scale = sum > 0 ? 1 / std::sqrt(sum) : 0;
      for (double& value : v) value *= scale;
    }
    for (std::int64_t i = 0; i < rows; ++i) {
      out[i * columns + column] = static_cast<float>(v[static_cast<std::size_t>(i)]);
    }
    block.push_back(std::move(v));
  }
}

void bucket_keys(std::uint64_t* keys, const float* z, std::int64_t rows, std::int64_t stride,
                 int hashes, int m) {
  for (std::int64_t i = 0; i < rows; ++i) keys[i] = bucket_key(z + i * stride, hashes, m);
}

std::int64_t group_by_key(std::int64_t* order, std::int64_t* offsets, const std::uint64_t* keys,
                          std::int64_t rows) {
  std::iota(order, order + rows, std::int64_t{0});
  std::stable_sort(order, order + rows,
                   [keys](std::int64_t a, std::int64_t b) { return keys[a] < keys[b]; });
  std::int64_t groups = 0;
  for (std::int64_t i = 0; i < rows; ++i) {
    if (i == 0 || keys[order[i]] != keys[order[i - 1]]) offsets[groups++] = i;
  }
  offsets[groups] = rows;
  return groups;
}

template <class T>
void segment_mean(float* out, const T* x, const std::int64_t* order, const std::int64_t* offsets,
                  std::int64_t segments, std::int64_t columns) {
  for (std::int64_t s = 0; s < segments; ++s) {
    float* mean = out + s * columns;
    std::fill(mean, mean + columns, 0.0F);
    const std::int64_t members = offsets[s + 1] - offsets[s];
    if (members == 0) continue;
    for (std::int64_t i = offsets[s]; i < offsets[s + 1]; ++i) {
      const T* row = x + order[i] * columns;
      for (std::int64_t j = 0; j < columns; ++j) mean[j] += to_float(row[j]);
    }
    const float scale = 1.0F / static_cast<float>(members);
    for (std::int64_t j = 0; j < columns; ++j) mean[j] *= scale;
  }
}

template void segment_mean<float>(float*, const float*, const std::int64_t*, const std::int64_t*,
                                  std::int64_t, std::int64_t);
template void segment_mean<Bfloat16>(float*, const Bfloat16*, const std::int64_t*,
                                     const std::int64_t*, std::int64_t, std::int64_t);

void nearest_centroid(std::int64_t* nearest, float* distance, float* scratch, const float* z,
                      const float* centroids, std::int64_t rows, std::int64_t count,
                      std::int64_t columns, bool or_none) {
  // In panels, filled up with centroids that are never the best.
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const std::int64_t padded = nearest_padded(count);
  float* packed = scratch;                       // [padded / kPanel, columns, kPanel]
  float* half_norm = packed + columns * padded;  // [padded]
  for (std::int64_t k = 0; k < padded; ++k) {
    float sum = 0;
    for (std::int64_t j = 0; j < columns; ++j) {
      const float value = k < count ? centroids[k * columns + j] : 0.0F;
      packed[(k / kPanel * columns + j) * kPanel + k % kPanel] = value;
      sum += value * value;
    }
    half_norm[k] = k < count ? 0.5F * sum : kInfinity;
  }
  const float least = or_none || count == 0 ? 0.0F : -kInfinity;
  const std::int32_t none = or_none || count == 0 ? -1 : 0;
  for (std::int64_t first = 0; first < rows; first += kRowBlock) {
    const std::int64_t block = std::min(kRowBlock, rows - first);
    // Lane by lane: the best among every 16th centroid.
    Vector best_score[kRowBlock][2];
    IntVector best[kRowBlock][2];
    std::fill_n(&best_score[0][0], 2 * block, Vector{} + least);
    std::fill_n(&best[0][0], 2 * block, IntVector{} + none);
    for (std::int64_t k = 0; k < padded; k += kPanel) {
      const PanelRow norm = load(half_norm + k);
      const IntVector number = IntVector{0, 1, 2, 3, 4, 5, 6, 7} + static_cast<std::int32_t>(k);
      for_tiles(block, [&](std::int64_t i, auto tile_rows) {
        PanelRow sum[tile_rows] = {};
        add_products<tile_rows>(sum, z + (first + i) * columns, columns, packed + k * columns,
                                columns);
        for (int r = 0; r < tile_rows; ++r) {
          for (int h = 0; h < 2; ++h) {
            const Vector score = sum[r].half[h] - norm.half[h];
            const IntVector better = score > best_score[i + r][h];
            best_score[i + r][h] = better ? score : best_score[i + r][h];
            best[i + r][h] = better ? number + h * kVector : best[i + r][h];
          }
        }
      });
    }
    for (std::int64_t i = 0; i < block; ++i) {
      float score = best_score[i][0][0];
      std::int32_t winner = best[i][0][0];
      for (int j = 1; j < kPanel; ++j) {
        const float other = best_score[i][j / kVector][j % kVector];
        const std::int32_t number = best[i][j / kVector][j % kVector];
        if (other > score || (other == score && number < winner)) {
          score = other;
          winner = number;
        }
      }
      nearest[first + i] = winner;
      if (distance != nullptr) {
        const float* row = z + (first + i) * columns;
        float norm = 0;
        for (std::int64_t j = 0; j < columns; ++j) norm += row[j] * row[j];
        distance[first + i] = std::max(0.0F, norm - 2 * score);
      }
    }
  }
}

}  // namespace lshmoe::kernels
