#pragma once
// Cross-polytope hashing and clustering. Host pointers, row-major, nothing kept after the call.
// Every sum has a fixed order that does not depend on the number of rows or threads.

#include <cmath>
#include <cstdint>

#include "lshmoe/kernels/bfloat16.hpp"
#include "lshmoe/kernels/host_device.hpp"
#include "lshmoe/kernels/packed_matrix.hpp"

namespace lshmoe::kernels {

/// Vertex of {+-e_0 .. +-e_(m-1)} nearest to z [m]: 2 i for +e_i, 2 i + 1 for -e_i; the first on
/// ties. (LSH-MoE, section 3.2; the published formula drops the sign, which is kept here.)
LSHMOE_HOST_DEVICE inline std::uint32_t cross_polytope_vertex(const float* z, int m) {
  int best = 0;
  float best_abs = -1.0F;
  for (int i = 0; i < m; ++i) {
    const float size = z[i] < 0 ? -z[i] : z[i];
    if (size > best_abs) {
      best_abs = size;
      best = i;
    }
  }
  return static_cast<std::uint32_t>(2 * best + (z[best] < 0 ? 1 : 0));
}

/// The vertices of `hashes` hashes, each over its own m columns of z, as one number.
/// (2 m)^hashes must fit 64 bits.
LSHMOE_HOST_DEVICE inline std::uint64_t bucket_key(const float* z, int hashes, int m) {
  std::uint64_t key = 0;
  for (int h = 0; h < hashes; ++h) {
    key = key * static_cast<std::uint64_t>(2 * m) + cross_polytope_vertex(z + h * m, m);
  }
  return key;
}

/// R [rows, columns] with orthonormal columns (each run of `rows` columns, when there are more
/// columns than rows), random from `seed`. Only +, -, *, / and sqrt of doubles: the same bits on
/// every machine.
void random_orthonormal(float* out, std::int64_t rows, std::int64_t columns, std::uint64_t seed);

/// keys [rows] of z [rows, stride].
void bucket_keys(std::uint64_t* keys, const float* z, std::int64_t rows, std::int64_t stride,
                 int hashes, int m);

/// Stable grouping: order [rows] lists the rows by ascending key, equal keys in row order;
/// offsets [groups + 1] (room for rows + 1) bounds the groups. Returns the number of groups.
std::int64_t group_by_key(std::int64_t* order, std::int64_t* offsets, const std::uint64_t* keys,
                          std::int64_t rows);

/// out [segments, columns]: mean of the rows order[offsets[s] .. offsets[s + 1]) of x [., columns]
/// (float or Bfloat16), summed in that order in fp32. An empty segment gives zeros.
template <class T>
void segment_mean(float* out, const T* x, const std::int64_t* order, const std::int64_t* offsets,
                  std::int64_t segments, std::int64_t columns);

/// The floats that nearest_centroid needs as scratch.
constexpr std::int64_t nearest_padded(std::int64_t count) { return (count + 15) / 16 * 16; }
constexpr std::int64_t nearest_scratch(std::int64_t count, std::int64_t columns) {
  return (columns + 1) * nearest_padded(count);
}

/// nearest [rows]: the centroid of least |z - c|^2, the first on ties, out of centroids
/// [count, columns]; with `or_none`, -1 where the origin is as near or nearer.
/// distance, when not null, [rows]: that |z - c|^2 (not below 0).
/// scratch [nearest_scratch(count, columns)].
void nearest_centroid(std::int64_t* nearest, float* distance, float* scratch, const float* z,
                      const float* centroids, std::int64_t rows, std::int64_t count,
                      std::int64_t columns, bool or_none);

}  // namespace lshmoe::kernels
