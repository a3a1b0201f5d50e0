#pragma once
// Products with a few columns of a matrix at a time: what PackedMatrix and nearest_centroid share.

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace lshmoe::kernels::panels {

// Eight floats that stay in one register; loops over arrays of them do not get unrolled into stack
// traffic as loops over floats do.
using Vector = float __attribute__((vector_size(32)));
inline constexpr int kVector = 8;
/// Columns that are multiplied at a time, one after another in memory: [inner, kPanel].
inline constexpr int kPanel = 2 * kVector;
inline constexpr int kTileRows = 4;

/// One row of a panel, or of sums for it.
struct PanelRow {
  Vector half[2];
};
// At any address of a float; one instruction a vector.
inline Vector load_vector(const float* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}
inline PanelRow load(const float* from) {
  return {{load_vector(from), load_vector(from + kVector)}};
}
inline void store(float* to, const PanelRow& row) {
  std::memcpy(to, &row.half[0], sizeof row.half[0]);
  std::memcpy(to + kVector, &row.half[1], sizeof row.half[1]);
}

/// sum [kRows] += x [kRows, inner] panel [inner, kPanel]; the sums stay in registers.
template <int kRows>
void add_products(PanelRow* sum, const float* x, std::int64_t stride, const float* panel,
                  std::int64_t inner) {
  PanelRow s[kRows];
  for (int i = 0; i < kRows; ++i) s[i] = sum[i];
  for (std::int64_t k = 0; k < inner; ++k) {
    const PanelRow row = load(panel + k * kPanel);
    for (int i = 0; i < kRows; ++i) {
      const float value = x[i * stride + k];
      s[i].half[0] += value * row.half[0];
      s[i].half[1] += value * row.half[1];
    }
  }
  for (int i = 0; i < kRows; ++i) sum[i] = s[i];
}

/// Calls part(first, kRows as a constant) for the rows 0 .. rows, a tile at a time.
template <class Part>
void for_tiles(std::int64_t rows, Part part) {
  std::int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) {
    part(i, std::integral_constant<int, kTileRows>());
  }
  for (; i < rows; ++i) part(i, std::integral_constant<int, 1>());
}

}  // namespace lshmoe::kernels::panels
