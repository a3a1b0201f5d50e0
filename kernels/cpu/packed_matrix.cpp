#include "lshmoe/kernels/packed_matrix.hpp"

#include <algorithm>
#include <cstring>

#include "lshmoe/kernels/cpu/panels.hpp"

namespace lshmoe::kernels {
namespace {
using namespace panels;
// Rows of a panel that stay in the first-level cache, rows of x that stay in the second.
constexpr std::int64_t kInnerBlock = 384, kRowBlock = 128;
}  // namespace

PackedMatrix::PackedMatrix(const float* matrix, std::int64_t inner, std::int64_t columns)
    : inner_(inner),
      columns_(columns),
      packed_(static_cast<std::size_t>((columns + kPanel - 1) / kPanel * inner * kPanel)) {
  for (std::int64_t first = 0; first < columns; first += kPanel) {
    const auto width = static_cast<std::size_t>(std::min<std::int64_t>(kPanel, columns - first));
    float* to = packed_.data() + first * inner;
    for (std::int64_t k = 0; k < inner; ++k, to += kPanel) {
      std::memcpy(to, matrix + k * columns + first, width * sizeof(float));
    }
  }
}

void PackedMatrix::multiply(float* out, const float* x, std::int64_t rows) const {
  if (inner_ == 0) std::fill(out, out + rows * columns_, 0.0F);
  for (std::int64_t first = 0; first < rows; first += kRowBlock) {
    const std::int64_t block = std::min(kRowBlock, rows - first);
    for (std::int64_t k = 0; k < inner_; k += kInnerBlock) {
      const std::int64_t inner = std::min(kInnerBlock, inner_ - k);
      for (std::int64_t column = 0; column < columns_; column += kPanel) {
        const float* panel = packed_.data() + column * inner_ + k * kPanel;
        const bool full = columns_ - column >= kPanel;
        const std::size_t bytes = sizeof(float) * static_cast<std::size_t>(std::min<std::int64_t>(
                                                      kPanel, columns_ - column));
        for_tiles(block, [&](std::int64_t i, auto tile_rows) {
          float* to = out + (first + i) * columns_ + column;
          PanelRow sum[tile_rows] = {};
          for (int r = 0; k > 0 && r < tile_rows; ++r) {
            if (full) {
              sum[r] = load(to + r * columns_);
            } else {
              std::memcpy(&sum[r], to + r * columns_, bytes);
            }
          }
          add_products<tile_rows>(sum, x + (first + i) * inner_ + k, inner_, panel, inner);
          for (int r = 0; r < tile_rows; ++r) {
            if (full) {
              store(to + r * columns_, sum[r]);
            } else {
              std::memcpy(to + r * columns_, &sum[r], bytes);
            }
          }
        });
      }
    }
  }
}

}  // namespace lshmoe::kernels
