#pragma once
// Rows where they lie, in a tensor of their own type.

#include <cstdint>

#include "lshmoe/kernels/bfloat16.hpp"
#include "lshmoe/kernels/rows.hpp"

namespace lshmoe {

/// Rows first .. first + rows of those that `index` names (null: of all, in their order). Does not
/// own them.
template <class T>
struct RowsView {
  const T* data = nullptr;  ///< [any, hidden]
  const std::int64_t* index = nullptr;
  std::int64_t first = 0, rows = 0, hidden = 0;

  /// Which row of `data` is row i here.
  [[nodiscard]] std::int64_t number(std::int64_t i) const {
    return index != nullptr ? index[first + i] : first + i;
  }
  [[nodiscard]] const T* row(std::int64_t i) const { return data + number(i) * hidden; }
  /// out [hidden] = row i.
  void read(float* out, std::int64_t i) const { kernels::convert(out, row(i), hidden); }
  /// out [count, hidden] = rows from .. from + count.
  void read(float* out, std::int64_t from, std::int64_t count) const {
    for (std::int64_t i = 0; i < count; ++i) read(out + i * hidden, from + i);
  }
  /// `count` of them from `from` on.
  [[nodiscard]] RowsView part(std::int64_t from, std::int64_t count) const {
    return {data, index, first + from, count, hidden};
  }
};

}  // namespace lshmoe
