#pragma once
// Picking rows, scattering rows, converting between fp32 and a row dtype.
//
// Host pointers; nothing is kept after the call. Index values are the caller's to check.

#include <cstddef>
#include <cstdint>

#include "lshmoe/kernels/bfloat16.hpp"

namespace lshmoe::kernels {

/// out [rows, row_bytes] = in[index[i]]; index null: rows in their order.
void gather_rows(void* out, const void* in, const std::int64_t* index, std::int64_t rows,
                 std::size_t row_bytes);
/// out[index[i]] = in [rows, row_bytes]; index null: rows in their order.
void scatter_rows(void* out, const std::int64_t* index, const void* in, std::int64_t rows,
                  std::size_t row_bytes);

/// out[j] = in[index[j]], j = 0 .. count - 1: elements of one row. out apart from the others.
void permute(float* out, const float* in, const std::int32_t* index, std::int64_t count);
void permute(Bfloat16* out, const Bfloat16* in, const std::int32_t* index, std::int64_t count);

/// Element by element; bfloat16 rounds to nearest, ties to even.
void convert(float* out, const Bfloat16* in, std::int64_t count);
void convert(Bfloat16* out, const float* in, std::int64_t count);
void convert(float* out, const float* in, std::int64_t count);

}  // namespace lshmoe::kernels
