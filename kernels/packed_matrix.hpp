#pragma once
// A matrix that many rows are multiplied by, in an order that nothing but the sizes decides: the
// bits of a product are the same for one row or many, and for any number of threads, which those of
// a BLAS are not.

#include <cstdint>
#include <vector>

namespace lshmoe::kernels {

/// matrix [inner, columns], copied and rearranged once. Immutable.
class PackedMatrix {
 public:
  /// Of no rows and columns.
  PackedMatrix() = default;
  /// matrix [inner, columns] row-major, read only during the call.
  PackedMatrix(const float* matrix, std::int64_t inner, std::int64_t columns);

  [[nodiscard]] std::int64_t inner() const { return inner_; }
  [[nodiscard]] std::int64_t columns() const { return columns_; }
  /// All that it holds, in an order of its own.
  [[nodiscard]] const std::vector<float>& packed() const { return packed_; }

  /// out [rows, columns] = x [rows, inner] times the matrix; both row-major, apart from each other.
  /// Each element is one running fp32 sum over inner, from its first to its last.
  void multiply(float* out, const float* x, std::int64_t rows) const;

 private:
  std::int64_t inner_ = 0, columns_ = 0;
  std::vector<float> packed_;  // [panels, inner, columns of a panel], filled up with zeros
};

/// out = x matrix, for a matrix that is used once.
inline void multiply(float* out, const float* x, const float* matrix, std::int64_t rows,
                     std::int64_t inner, std::int64_t columns) {
  PackedMatrix(matrix, inner, columns).multiply(out, x, rows);
}

}  // namespace lshmoe::kernels
