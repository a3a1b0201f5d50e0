#pragma once
// Rows as they are or in fixed formats (kernels/formats.hpp) on the GPU, from and to parcels.
// Launchers (stream.hpp); the same bytes and values as on the CPU.

#include <cstdint>

#include "lshmoe/kernels/cuda/parcel.hpp"
#include "lshmoe/kernels/formats.hpp"

namespace lshmoe::kernels::cuda {

/// Stochastic rounding: the noise is a function of the stream and the row.
struct StochasticNoise {
  bool on = false;
  std::uint64_t stream = 0;
};

/// Codes row i of the stream to its place in out: the parcel's begin + head_bytes + row_bytes *
/// (i - first). squared [rows]: the rows' sums of squares; error [rows]: |x - x'|.
template <class T>
void encode_format(RowFormat format, std::uint8_t* out, const ParcelPlace* places,
                   std::int64_t count, double* squared, double* error, const RowsOf<T>& rows,
                   StochasticNoise noise, Stream stream);

/// The inverse, to out[index[i]] (null: i; values outside 0 .. out_rows are skipped). bad[0] takes
/// the least row of bytes that are never written.
template <class T>
void decode_format(RowFormat format, T* out, const std::int64_t* index, std::int64_t out_rows,
                   std::int64_t* bad, const RawPlace* places, std::int64_t count, std::int64_t rows,
                   std::int64_t hidden, Stream stream);

/// Kind bf16 of float rows: rounded, and back.
void encode_bfloat16(std::uint8_t* out, const ParcelPlace* places, std::int64_t count,
                     double* squared, double* error, const RowsOf<float>& rows, Stream stream);
void decode_bfloat16(float* out, const std::int64_t* index, std::int64_t out_rows,
                     const RawPlace* places, std::int64_t count, std::int64_t rows,
                     std::int64_t hidden, Stream stream);

}  // namespace lshmoe::kernels::cuda
