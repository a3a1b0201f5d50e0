#include "lshmoe/kernels/lsh.hpp"

#include <algorithm>
#include <bit>
#include <numeric>
#include <vector>

namespace lshmoe::kernels {
namespace {
std::uint64_t splitmix64(std::uint64_t& state) {
  std::uint64_t z = (state += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// Eight floats that stay in one register; loops over arrays of them do not get unrolled into stack
// traffic as loops over floats do.
using Vector = float __attribute__((vector_size(32)));
// The same at any address of a float.
using LooseVector = float __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int kVector = 8;

// out [kRows, kVectors * 8] of one tile; the sums stay in registers.
template <int kRows, int kVectors>
void multiply_tile(float* out, const float* x, const float* matrix, std::int64_t inner,
                   std::int64_t columns) {
  Vector sum[kRows][kVectors] = {};
  for (std::int64_t k = 0; k < inner; ++k) {
    Vector row[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      row[j] = *reinterpret_cast<const LooseVector*>(matrix + k * columns + j * kVector);
    }
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kVectors; ++j) sum[i][j] += x[i * inner + k] * row[j];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      *reinterpret_cast<LooseVector*>(out + i * columns + j * kVector) = sum[i][j];
    }
  }
}

template <int kVectors>
void multiply_columns(float* out, const float* x, const float* matrix, std::int64_t rows,
                      std::int64_t inner, std::int64_t columns) {
  std::int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    multiply_tile<4, kVectors>(out + i * columns, x + i * inner, matrix, inner, columns);
  }
  for (; i < rows; ++i) {
    multiply_tile<1, kVectors>(out + i * columns, x + i * inner, matrix, inner, columns);
  }
}
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

void multiply(float* out, const float* x, const float* matrix, std::int64_t rows,
              std::int64_t inner, std::int64_t columns) {
  std::int64_t j = 0;
  for (; j + 2 * kVector <= columns; j += 2 * kVector) {
    multiply_columns<2>(out + j, x, matrix + j, rows, inner, columns);
  }
  for (; j + kVector <= columns; j += kVector) {
    multiply_columns<1>(out + j, x, matrix + j, rows, inner, columns);
  }
  for (; j < columns; ++j) {
    for (std::int64_t i = 0; i < rows; ++i) {
      float sum = 0;
      for (std::int64_t k = 0; k < inner; ++k) sum += x[i * inner + k] * matrix[k * columns + j];
      out[i * columns + j] = sum;
    }
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

void segment_mean(float* out, const float* x, const std::int64_t* order,
                  const std::int64_t* offsets, std::int64_t segments, std::int64_t columns) {
  for (std::int64_t s = 0; s < segments; ++s) {
    float* mean = out + s * columns;
    std::fill(mean, mean + columns, 0.0F);
    const std::int64_t members = offsets[s + 1] - offsets[s];
    if (members == 0) continue;
    for (std::int64_t i = offsets[s]; i < offsets[s + 1]; ++i) {
      const float* row = x + order[i] * columns;
      for (std::int64_t j = 0; j < columns; ++j) mean[j] += row[j];
    }
    const float scale = 1.0F / static_cast<float>(members);
    for (std::int64_t j = 0; j < columns; ++j) mean[j] *= scale;
  }
}

void nearest_centroid(std::int64_t* nearest, float* distance, float* scratch, const float* z,
                      const float* centroids, std::int64_t rows, std::int64_t count,
                      std::int64_t columns, bool or_none) {
  // Transposed and filled up with zeros to whole tiles of multiply().
  const std::int64_t padded = nearest_padded(count);
  float* transposed = scratch;                       // [columns, padded]
  float* half_norm = transposed + columns * padded;  // [padded]
  float* score = half_norm + padded;                 // [kNearestRows, padded]
  std::fill(transposed, transposed + columns * padded, 0.0F);
  for (std::int64_t k = 0; k < count; ++k) {
    float sum = 0;
    for (std::int64_t j = 0; j < columns; ++j) {
      const float value = centroids[k * columns + j];
      transposed[j * padded + k] = value;
      sum += value * value;
    }
    half_norm[k] = 0.5F * sum;
  }
  for (std::int64_t first = 0; first < rows; first += kNearestRows) {
    const std::int64_t block = std::min(kNearestRows, rows - first);
    multiply(score, z + first * columns, transposed, block, columns, padded);
    for (std::int64_t i = 0; i < block; ++i) {
      const float* s = score + i * padded;
      std::int64_t best = or_none || count == 0 ? -1 : 0;
      float best_score = best < 0 ? 0.0F : s[0] - half_norm[0];
      for (std::int64_t k = 0; k < count; ++k) {
        const float value = s[k] - half_norm[k];
        if (value > best_score) {
          best_score = value;
          best = k;
        }
      }
      nearest[first + i] = best;
      if (distance != nullptr) {
        const float* row = z + (first + i) * columns;
        float norm = 0;
        for (std::int64_t j = 0; j < columns; ++j) norm += row[j] * row[j];
        distance[first + i] = std::max(0.0F, norm - 2 * best_score);
      }
    }
  }
}

}  // namespace lshmoe::kernels
