#pragma once
// kernels/rows.hpp on the GPU: the same arguments in device memory, and a stream (stream.hpp).

#include <cstddef>
#include <cstdint>

#include "lshmoe/kernels/bfloat16.hpp"
#include "lshmoe/kernels/cuda/stream.hpp"

namespace lshmoe::kernels::cuda {

/// out [rows, row_bytes] = in[index[i]]; index null: rows in their order.
void gather_rows(void* out, const void* in, const std::int64_t* index, std::int64_t rows,
                 std::size_t row_bytes, Stream stream);
/// out[index[i]] = in [rows, row_bytes]; index null: rows in their order.
void scatter_rows(void* out, const std::int64_t* index, const void* in, std::int64_t rows,
                  std::size_t row_bytes, Stream stream);

/// Element by element; bfloat16 rounds to nearest, ties to even.
void convert(float* out, const Bfloat16* in, std::int64_t count, Stream stream);
void convert(Bfloat16* out, const float* in, std::int64_t count, Stream stream);

}  // namespace lshmoe::kernels::cuda
