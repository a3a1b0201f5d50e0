#include "lshmoe/kernels/rows.hpp"

#include <cstring>

namespace lshmoe::kernels {

void gather_rows(void* out, const void* in, const std::int64_t* index, std::int64_t rows,
                 std::size_t row_bytes) {
  if (rows == 0) return;
  auto* to = static_cast<char*>(out);
  const auto* from = static_cast<const char*>(in);
  if (index == nullptr) {
    std::memcpy(to, from, static_cast<std::size_t>(rows) * row_bytes);
    return;
  }
  for (std::int64_t i = 0; i < rows; ++i) {
    std::memcpy(to + static_cast<std::size_t>(i) * row_bytes,
                from + static_cast<std::size_t>(index[i]) * row_bytes, row_bytes);
  }
}

void scatter_rows(void* out, const std::int64_t* index, const void* in, std::int64_t rows,
                  std::size_t row_bytes) {
  if (rows == 0) return;
  auto* to = static_cast<char*>(out);
  const auto* from = static_cast<const char*>(in);
  if (index == nullptr) {
    std::memcpy(to, from, static_cast<std::size_t>(rows) * row_bytes);
    return;
  }
  for (std::int64_t i = 0; i < rows; ++i) {
    std::memcpy(to + static_cast<std::size_t>(index[i]) * row_bytes,
                from + static_cast<std::size_t>(i) * row_bytes, row_bytes);
  }
}

namespace {
template <class T>
void permute_row(T* out, const T* in, const std::int32_t* index, std::int64_t count) {
  std::int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    // All reads before the writes, which the compiler must take for writes to `in`.
    const T a = in[index[j]], b = in[index[j + 1]], c = in[index[j + 2]], d = in[index[j + 3]];
    out[j] = a;
    out[j + 1] = b;
    out[j + 2] = c;
    out[j + 3] = d;
  }
  for (; j < count; ++j) out[j] = in[index[j]];
}
}  // namespace
void permute(float* out, const float* in, const std::int32_t* index, std::int64_t count) {
  permute_row(out, in, index, count);
}
void permute(Bfloat16* out, const Bfloat16* in, const std::int32_t* index, std::int64_t count) {
  permute_row(out, in, index, count);
}

void convert(float* out, const Bfloat16* in, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = to_float(in[i]);
}
void convert(Bfloat16* out, const float* in, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = to_bfloat16(in[i]);
}
void convert(float* out, const float* in, std::int64_t count) {
  if (count > 0) std::memcpy(out, in, static_cast<std::size_t>(count) * sizeof(float));
}

}  // namespace lshmoe::kernels
